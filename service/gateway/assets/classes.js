// The tab that fits classes to piles of photos and tries them.
import { bars, fill, get, make, picture, server, showError, takeFiles } from "./shared.js";
import { SHOWN_FILES, showSnippets } from "./snippets.js";

const panel = document.getElementById("classes"), form = panel.querySelector("form");
const piles = document.getElementById("piles"), fitted = document.getElementById("fitted");
const progress = document.getElementById("progress");
const POLL_MS = 400;
const contents = new Map(); // the photos of each pile

export async function show() {
  try {
    const models = (await server().models()).filter((model) => model.state === "ready" && model.modalities?.includes("image"));
    fill(form.trunk, [...new Set(models.map((model) => model.trunk))].map((trunk) => [trunk, trunk]));
  } catch (error) {
    showError(error, fitted);
  }
  while (piles.children.length < 2) addPile();
}

function addPile() {
  const number = piles.children.length + 1;
  const pile = make("div", "", piles, { className: "pile" });
  make("input", "", pile, { value: `class ${number}`, ariaLabel: `Name of class ${number}` });
  make("input", "", pile, { type: "file", accept: "image/*", multiple: true, ariaLabel: `Photos of class ${number}` });
  const shown = make("div", "Drop photos here.", pile);
  contents.set(pile, []);
  takeFiles(pile, (files) => {
    contents.get(pile).push(...files);
    showPile(pile, shown);
  });
}

/** The photos of a pile; a click removes one. */
function showPile(pile, shown) {
  const own = contents.get(pile);
  shown.replaceChildren(own.length ? "" : "Drop photos here.");
  for (const file of own) {
    const title = `Remove ${file.name}`, button = make("button", "", shown, { type: "button", title, className: "photo" });
    picture(file, title, button);
    button.addEventListener("click", () => {
      own.splice(own.indexOf(file), 1);
      showPile(pile, shown);
    });
  }
}

async function fit() {
  const name = form.elements.name.value, body = new FormData();
  const fields = Object.entries({ name, trunk: form.trunk.value, kind: form.kind.value, replace: true });
  const files = [...contents.values()].flat();
  const labels = [...contents].flatMap(([pile, own]) => own.map(() => ["label", pile.querySelector("input").value.trim()]));
  for (const [field, value] of [...fields, ...labels]) body.append(field, value);
  for (const file of files) body.append("image", file);
  showSnippets(document.getElementById("fit-request"), {
    path: "/heads",
    fields: [...fields, ...labels.slice(0, SHOWN_FILES)],
    files: files.map((file) => ["image", file.name]),
    call: 'send("POST", "/heads", { body: form }) // a FormData with these fields',
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

async function watch(name) {
  for (;;) {
    const head = await server().send("GET", `/heads/${encodeURIComponent(name)}`);
    if (head.state === "failed") throw new Error(head.reason);
    if (head.state === "ready") break;
    const { stage = head.state, done, total, accuracy } = head.progress ?? {};
    const share = total ? ` ${done} of ${total}` : "", right = accuracy ? `, ${(100 * accuracy).toFixed(0)} % right` : "";
    progress.textContent = `${stage}${share}${right}`;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  progress.textContent = `${name} is ready: /classify?model=${name}`;
  await showFitted(name);
}

async function showFitted(name) {
  const curve = await get(`heads/${encodeURIComponent(name)}/curve.png`).catch(() => null); // some have none
  if (curve) picture(await curve.blob(), "How accuracy grew while it was fitted", make("figure", "", fitted));
  const attempt = make("div", "", fitted, { className: "pile" });
  make("input", "", attempt, { type: "file", accept: "image/*", ariaLabel: "Photo to try" });
  make("p", "Drop a photo here to try the classes.", attempt);
  const result = make("section", "", attempt);
  takeFiles(attempt, async ([file]) => {
    try {
      const [entry] = await server().classify([file], { model: name });
      result.replaceChildren();
      picture(file, file.name, result);
      if (entry.error) throw new Error(entry.error.detail);
      bars(entry.predictions, result);
    } catch (error) {
      showError(error, result);
    }
  });
}

form.add.addEventListener("click", addPile);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  fit();
});
