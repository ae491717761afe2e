// The tab that adds photos to a collection and searches them.
import { decode, photoCanvas } from "./canvas.js";
import { SAMPLES, sampleFile, showSamples, TEXTURES } from "./samples.js";
import { fill, make, picture, server, showError, takeFiles, takePasted } from "./shared.js";
import { SHOWN_FILES, showSnippets } from "./snippets.js";

const about = document.getElementById("collection"), query = document.getElementById("query");
const indexed = document.getElementById("indexed"), hits = document.getElementById("hits");
const HITS = 12;
const ALL = [...SAMPLES, ...TEXTURES];
const SIDE = 192, QUALITY = 0.6, MAX_THUMBNAIL = 16384; // pixels of a thumbnail, and the server's limit in bytes
const LOOKED_AT = 1000; // images whose metadata the filter suggests
const OF_FILES = ["size", "modified_ms"]; // metadata of `vitrail index` that nobody looks for
let last = null; // what was looked for
let searches = 0; // the answer of an older one is not shown
let fields = new Map(); // of the collection's metadata, each with its values by their text

export async function show() {
  try {
    const models = (await server().models()).filter((model) =>
      model.state === "ready" && model.tasks.includes("embed") && model.modalities?.includes("image"));
    // those that embed texts, too, come first
    models.sort((one, other) => other.modalities.includes("text") - one.modalities.includes("text"));
    fill(about.model, models.map(({ name, modalities }) =>
      [modalities.includes("text") ? `${name} (photos and words)` : `${name} (photos)`, name]));
    await showCollections();
  } catch (error) {
    showError(error, indexed);
  }
}

/** The collections that exist, as suggestions for the name, and what the named one holds. */
async function showCollections() {
  const found = await server().collections(), name = about.elements.name.value;
  document.getElementById("collections").replaceChildren(
    ...found.map(({ name, images }) => new Option(`${images} photos`, name)));
  const chosen = found.find((each) => each.name === name);
  about.elements.remove.hidden = !chosen;
  about.model.disabled = Boolean(chosen); // a collection keeps its model
  if (chosen) about.model.value = chosen.model;
  const others = found.filter((each) => each !== chosen).map((each) => each.name);
  indexed.textContent = chosen ? `${chosen.images} photos in ${name}.` : `There is no collection ${name} yet.`;
  if (others.length) indexed.append(` Other collections: ${others.join(", ")}.`);
  showFilter(chosen ? (await server().images(name, { limit: LOOKED_AT })).images : []);
}

/** The fields by which the images differ, and their values as suggestions. */
function showFilter(images) {
  fields = new Map();
  for (const { metadata } of images)
    for (const [field, value] of Object.entries(metadata))
      if (!OF_FILES.includes(field)) fields.set(field, (fields.get(field) ?? new Map()).set(String(value), value));
  query.field.closest("label").hidden = !fields.size;
  fill(query.field, [["everything", ""], ...[...fields.keys()].map((field) => [field, field])]);
  showValues();
}

function showValues() {
  const values = fields.get(query.field.value);
  query.value.hidden = !values;
  document.getElementById("values").replaceChildren(...[...(values?.keys() ?? [])].sort().map((value) => new Option(value)));
}

/** The filter of a search. A value that no image of those looked at has is a text. */
function filter() {
  const field = query.field.value, value = query.value.value;
  if (!field || !value) return {};
  return { filter: { [field]: fields.get(field).has(value) ? fields.get(field).get(value) : value } };
}

/** A small JPEG that the server keeps to show a photo by; none of what this browser cannot read. */
async function thumbnail(file) {
  const photo = await decode(file);
  if (!photo) return null;
  const { width, height } = photo;
  const { canvas, context } = photoCanvas(null, width, height, SIDE * Math.min(1, width / height), null);
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, 2 * width, 2 * height); // also the last pixels, where the canvas is rounded up
  context.drawImage(photo, 0, 0);
  photo.close();
  const small = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
  return small && small.size <= MAX_THUMBNAIL ? small : null;
}

async function add(files) {
  files = files.filter((file) => file.type.startsWith("image/")); // a folder holds others, too
  if (!files.length) return showError(new Error("No images among these."), indexed);
  const name = about.elements.name.value, client = server();
  client.progress = (done, all) => (indexed.textContent = `${done} of ${all} photos`);
  try {
    await client.createCollection(name, { model: about.model.value });
    const items = files.map((image) => {
      const id = image.path ?? (image.webkitRelativePath || image.name), folder = id.split("/").at(-2);
      return { image, id, metadata: folder ? { folder } : {} };
    });
    const results = await client.addImages(name, items, about.elements.thumbnails.checked ? { thumbnail } : {});
    const failed = results.filter((result) => result.error).length;
    showAdding(name, items);
    await showCollections();
    if (failed) indexed.append(` ${failed} could not be read.`);
  } catch (error) {
    showError(error, indexed);
  }
}

async function remove() {
  const name = about.elements.name.value;
  if (!confirm(`Delete the collection ${name}?`)) return;
  try {
    await server().deleteCollection(name);
    hits.replaceChildren();
    await showCollections();
  } catch (error) {
    showError(error, indexed);
  }
}

/** Repeat the search with what the filter is now. */
function again() {
  if (last) find(last);
}

async function find(what) {
  const name = about.elements.name.value, asked = { ...what, ...filter(), k: HITS }, number = ++searches;
  last = what;
  try {
    const found = await server().search(name, { ...asked, thumbnails: true });
    if (number !== searches) return;
    showSearch(name, asked);
    hits.replaceChildren();
    if (!found.length) make("p", asked.filter ? "No photo has that." : `${name} is empty.`, hits);
    for (const { id, score, thumbnail } of found) {
      const figure = make("figure", "", hits);
      if (thumbnail) picture(`data:image/jpeg;base64,${thumbnail}`, id, figure);
      make("figcaption", `${id} ${score.toFixed(3)}`, figure);
    }
  } catch (error) {
    if (number === searches) showError(error, hits);
  }
}

function showAdding(name, items) {
  const fields = items.slice(0, SHOWN_FILES).map(({ id }) => ["id", id]);
  const files = items.map(({ image }) => ["image", image.name]);
  showRequest(name, "images", { fields, files });
}

function showSearch(name, { image, ...given }) {
  if (!image) return showRequest(name, "search", { json: given });
  const fields = Object.entries(given).map(([field, value]) => [field, field === "filter" ? JSON.stringify(value) : value]);
  showRequest(name, "search", { fields, files: [["image", image.name]] });
}

function showRequest(name, route, sent) {
  showSnippets(document.getElementById("search-request"), { path: `/collections/${name}/${route}`, ...sent });
}

for (const element of about.querySelectorAll(".drop")) takeFiles(element, add);
for (const element of query.querySelectorAll(".drop")) takeFiles(element, ([image]) => find({ image }));
takePasted(document.getElementById("search"), ([image]) => find({ image }));
showSamples(query.querySelector(".strip"), ([image]) => find({ image }));
document.getElementById("index-samples").addEventListener("click", async () =>
  add(await Promise.all(ALL.map(sampleFile))));
about.elements.remove.addEventListener("click", remove);
about.elements.name.addEventListener("change", show);
about.addEventListener("submit", (event) => event.preventDefault());
query.field.addEventListener("change", () => {
  query.value.value = "";
  showValues();
  if (!query.field.value) again();
});
query.value.addEventListener("change", again);
query.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = query.text.value.trim();
  if (text) find({ text });
  else query.text.focus();
});
