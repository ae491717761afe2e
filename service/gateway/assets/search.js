// The tab that adds photos to a collection and searches them.
import { fill, make, picture, server, showError, takeFiles } from "./shared.js";
import { showSnippets } from "./snippets.js";

const about = document.getElementById("collection"), query = document.getElementById("query");
const indexed = document.getElementById("indexed"), hits = document.getElementById("hits");
// The server keeps embeddings alone, so that photos are shown as long as the page is open.
const photos = new Map();
const HITS = 12;

export async function show() {
  try {
    const models = (await server().models()).filter((model) =>
      model.state === "ready" && model.tasks.includes("embed") && model.modalities?.includes("image"));
    // those that embed texts, too, come first
    models.sort((one, other) => other.modalities.includes("text") - one.modalities.includes("text"));
    fill(about.model, models.map((model) => [model.name, model.name]));
    const found = await server().collections();
    const options = found.map(({ name, images }) => new Option(`${images} images`, name));
    document.getElementById("collections").replaceChildren(...options);
  } catch (error) {
    showError(error, indexed);
  }
}

async function add(files) {
  const name = about.elements.name.value, client = server();
  client.progress = (done, all) => (indexed.textContent = `${done} of ${all} photos`);
  try {
    await client.createCollection(name, { model: about.model.value });
    const items = files.map((file) => ({ image: file, id: file.webkitRelativePath || file.name }));
    const results = await client.addImages(name, items);
    for (const [place, { id }] of results.entries()) if (id) photos.set(`${name}/${id}`, files[place]);
    const failed = results.filter((result) => result.error).length;
    const { images } = await client.send("GET", `/collections/${name}`);
    indexed.textContent = `${images} photos in ${name}${failed ? `, ${failed} could not be read` : ""}`;
  } catch (error) {
    showError(error, indexed);
  }
}

async function find(what) {
  const name = about.elements.name.value;
  try {
    const found = await server().search(name, { ...what, k: HITS });
    showRequest(name, what);
    hits.replaceChildren();
    if (!found.length) make("p", "nothing found", hits);
    for (const { id, score } of found) {
      const figure = make("figure", "", hits), photo = photos.get(`${name}/${id}`);
      if (photo) picture(photo, id, figure);
      make("figcaption", `${id} ${score.toFixed(3)}`, figure);
    }
  } catch (error) {
    showError(error, hits);
  }
}

function showRequest(name, { image, ...query }) {
  const path = `/collections/${name}/search`, files = image ? [["image", image.name]] : [];
  const given = { ...query, k: HITS };
  const call = `search("${name}", ${image ? `{ image: file, k: ${HITS} }` : JSON.stringify(given)})`;
  const sent = image ? { fields: Object.entries(given), files } : { json: given };
  showSnippets(document.getElementById("search-request"), { path, call, ...sent });
}

takeFiles(about.querySelector(".drop"), add);
takeFiles(query.querySelector(".drop"), ([image]) => find({ image }));
query.addEventListener("submit", (event) => {
  event.preventDefault();
  if (query.text.value.trim()) find({ text: query.text.value.trim() });
});
