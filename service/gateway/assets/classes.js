// The tab that fits classes to piles of photos and tries them.
import { drawLine } from "./canvas.js";
import { pieces, TEXTURES } from "./samples.js";
import { bars, fill, get, make, picture, server, showError, takeFiles } from "./shared.js";
import { SHOWN_FILES, showSnippets } from "./snippets.js";

const panel = document.getElementById("classes"), form = panel.querySelector("form");
const piles = document.getElementById("piles"), fitted = document.getElementById("fitted");
const progress = document.getElementById("progress");
const POLL_MS = 400;
const contents = new Map(); // the photos of each pile
let toTry = []; // samples that are in no pile
let count = 0; // piles so far
let dragged = null; // a photo, on its way to another pile

export async function show() {
  try {
    const models = (await server().models()).filter((model) => model.state === "ready" && model.modalities?.includes("image"));
    fill(form.trunk, [...new Set(models.map((model) => model.trunk))].map((trunk) => [trunk, trunk]));
  } catch (error) {
    showError(error, fitted);
  }
  while (piles.children.length < 2) addPile();
}

function addPile(label, files = []) {
  const number = ++count, name = label ?? `class ${number}`;
  const pile = make("div", "", piles, { className: "pile" });
  const named = make("input", "", pile, { value: name, ariaLabel: `Name of class ${number}` });
  make("input", "", pile, { type: "file", accept: "image/*", multiple: true, ariaLabel: `Photos of class ${number}` });
  const shown = make("div", "", pile, { className: "photos" });
  contents.set(pile, files);
  showPile(pile, shown);
  pile.addEventListener("drop", () => {
    if (!dragged) return;
    dragged.remove();
    contents.get(pile).push(dragged.file);
    dragged = null; // what was removed tells no end
    showPile(pile, shown);
  });
  takeFiles(pile, (more) => {
    more = more.filter((file) => file.type.startsWith("image/"));
    const folder = more[0]?.path?.split("/").at(-2);
    if (folder && named.value === name) named.value = folder; // unless a name was typed
    contents.get(pile).push(...more);
    showPile(pile, shown);
  });
}

/** Piles of the samples' pieces in place of empty ones. The last piece of each is left to try. */
async function addSamplePiles() {
  const cut = await Promise.all(TEXTURES.map(pieces));
  toTry = cut.map((files) => files.pop());
  for (const [pile, files] of contents)
    if (!files.length) {
      contents.delete(pile);
      pile.remove();
    }
  for (const [place, name] of TEXTURES.entries()) addPile(name, cut[place]);
}

/** The photos of a pile; a click removes one. */
function showPile(pile, shown) {
  const own = contents.get(pile);
  shown.replaceChildren(...(own.length ? [] : [make("p", "Drop photos here.")]));
  for (const file of own) {
    const title = `Remove ${file.name}`, button = make("button", "", shown, { type: "button", title, className: "photo" });
    const remove = () => {
      own.splice(own.indexOf(file), 1);
      showPile(pile, shown);
    };
    button.draggable = true;
    picture(file, title, button).draggable = false; // or a copy of the photo would be dropped
    button.addEventListener("click", remove);
    button.addEventListener("dragstart", (event) => {
      dragged = { file, remove };
      event.dataTransfer.setData("text/plain", file.name); // Firefox drags nothing without data
    });
    button.addEventListener("dragend", () => (dragged = null));
  }
}

async function fit() {
  const full = [...contents.values()].filter((own) => own.length).length;
  if (full < 2)
    return showError(new Error("Two classes or more need photos. Drop some on their piles, or use the sample piles."), fitted);
  const name = form.elements.name.value, body = new FormData();
  const replace = await exists(name);
  if (replace && !confirm(`There is a head ${name}. Replace it?`)) return;
  const fields = Object.entries({ name, trunk: form.trunk.value, kind: form.kind.value, ...(replace && { replace }) });
  const photos = [...contents].flatMap(([pile, own]) => {
    const label = pile.querySelector("input").value.trim();
    return own.map((file, place) => ({ file, place, label }));
  });
  for (const [field, value] of fields) body.append(field, value);
  for (const { label } of photos) body.append("label", label);
  for (const { file } of photos) body.append("image", file);
  const shown = [...photos].sort((one, other) => (one.place > 1) - (other.place > 1)); // of several classes
  showSnippets(document.getElementById("fit-request"), {
    path: "/heads",
    fields: [...fields, ...shown.slice(0, SHOWN_FILES).map(({ label }) => ["label", label])],
    files: shown.map(({ file }) => ["image", file.name]),
  });
  fitted.replaceChildren();
  progress.textContent = "sending the photos";
  try {
    await server().send("POST", "/heads", { body });
    await watch(name);
  } catch (error) {
    progress.textContent = "";
    showError(error, fitted);
  }
}

/** Whether there is a head of that name. If that cannot be told, the server refuses to replace one. */
async function exists(name) {
  try {
    await server().send("GET", `/heads/${encodeURIComponent(name)}`);
    return true;
  } catch {
    return false;
  }
}

async function watch(name) {
  const grown = [], curve = make("canvas", "", fitted, { width: 480, height: 80, ariaHidden: "true" });
  for (;;) {
    const head = await server().send("GET", `/heads/${encodeURIComponent(name)}`);
    if (head.state === "failed") throw new Error(head.reason);
    if (head.state === "ready") break;
    const { stage = head.state, done, total, accuracy } = head.progress ?? {};
    const share = total ? ` ${done} of ${total}` : "", right = accuracy ? `, ${(100 * accuracy).toFixed(0)} % right` : "";
    progress.textContent = `${stage}${share}${right}`;
    if (accuracy) grown.push(accuracy);
    drawLine(curve, grown, 1);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  progress.textContent = `${name} is ready: here below, as a model in Try, and at /classify?model=${name}`;
  fitted.replaceChildren();
  await showFitted(name);
}

async function showFitted(name) {
  const curve = await get(`heads/${encodeURIComponent(name)}/curve.png`).catch(() => null); // some have none
  if (curve) picture(await curve.blob(), "How accuracy grew while it was fitted", make("figure", "", fitted));
  const attempt = make("div", "", fitted, { className: "pile" });
  make("input", "", attempt, { type: "file", accept: "image/*", ariaLabel: "Photo to try" });
  make("p", "Drop a photo here to try the classes.", attempt);
  const strip = make("div", "", attempt, { className: "strip" }), result = make("section", "", attempt);
  const classify = async ([file]) => {
    try {
      const [entry] = await server().classify([file], { model: name });
      result.replaceChildren();
      picture(file, file.name, result);
      if (entry.error) throw new Error(entry.error.detail);
      bars(entry.predictions, result);
    } catch (error) {
      showError(error, result);
    }
  };
  for (const file of toTry) {
    const button = make("button", "", strip, { type: "button", className: "photo" });
    picture(file, `Try ${file.name}`, button);
    button.addEventListener("click", () => classify([file]));
  }
  takeFiles(attempt, classify);
}

form.add.addEventListener("click", () => addPile());
document.getElementById("sample-piles").addEventListener("click", addSamplePiles);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  fit();
});
