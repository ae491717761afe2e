// The tab that adds photos to a collection and searches them.
import { address, SAMPLES, sampleFile, showSamples, TEXTURES } from "./samples.js";
import { fill, make, picture, server, showError, takeFiles, takePasted } from "./shared.js";
import { SHOWN_FILES, showSnippets } from "./snippets.js";

const about = document.getElementById("collection"), query = document.getElementById("query");
const indexed = document.getElementById("indexed"), hits = document.getElementById("hits");
// The server keeps embeddings alone, so that photos other than samples are shown as long as the page is open.
const photos = new Map();
const HITS = 12;
const ALL = [...SAMPLES, ...TEXTURES];

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
}

async function add(files, metadata = () => ({})) {
  files = files.filter((file) => file.type.startsWith("image/")); // a folder holds others, too
  if (!files.length) return showError(new Error("No images among these."), indexed);
  const name = about.elements.name.value, client = server();
  client.progress = (done, all) => (indexed.textContent = `${done} of ${all} photos`);
  try {
    await client.createCollection(name, { model: about.model.value });
    const items = files.map((file) => ({
      image: file, id: file.path ?? (file.webkitRelativePath || file.name), metadata: metadata(file),
    }));
    const results = await client.addImages(name, items);
    for (const [place, { id }] of results.entries()) if (id) photos.set(`${name}/${id}`, files[place]);
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

async function find(what) {
  const name = about.elements.name.value;
  try {
    const found = await server().search(name, { ...what, k: HITS });
    showSearch(name, what);
    hits.replaceChildren();
    if (!found.length) make("p", `${name} is empty.`, hits);
    for (const { id, score, metadata } of found) {
      const figure = make("figure", "", hits);
      const photo = photos.get(`${name}/${id}`) ?? (ALL.includes(metadata.sample) && address(metadata.sample));
      if (photo) picture(photo, id, figure);
      make("figcaption", `${id} ${score.toFixed(3)}`, figure);
    }
  } catch (error) {
    showError(error, hits);
  }
}

function showAdding(name, items) {
  const fields = items.slice(0, SHOWN_FILES).map(({ id }) => ["id", id]);
  const files = items.map(({ image }) => ["image", image.name]);
  showRequest(name, "images", { fields, files }, "addImages", "[{ image: file, id: file.name }]");
}

function showSearch(name, { image, ...query }) {
  const given = { ...query, k: HITS };
  if (!image) return showRequest(name, "search", { json: given }, "search", JSON.stringify(given));
  const sent = { fields: Object.entries(given), files: [["image", image.name]] };
  showRequest(name, "search", sent, "search", `{ image: file, k: ${HITS} }`);
}

function showRequest(name, route, sent, method, argument) {
  const path = `/collections/${name}/${route}`, call = `${method}("${name}", ${argument})`;
  showSnippets(document.getElementById("search-request"), { path, call, ...sent });
}

for (const element of about.querySelectorAll(".drop")) takeFiles(element, add);
for (const element of query.querySelectorAll(".drop")) takeFiles(element, ([image]) => find({ image }));
takePasted(document.getElementById("search"), ([image]) => find({ image }));
showSamples(query.querySelector(".strip"), ([image]) => find({ image }));
document.getElementById("index-samples").addEventListener("click", async () =>
  add(await Promise.all(ALL.map(sampleFile)), (file) => ({ sample: file.name.replace(".jpg", "") })));
about.elements.remove.addEventListener("click", remove);
about.elements.name.addEventListener("change", show);
about.addEventListener("submit", (event) => event.preventDefault());
query.addEventListener("submit", (event) => {
  event.preventDefault();
  if (query.text.value.trim()) find({ text: query.text.value.trim() });
});
