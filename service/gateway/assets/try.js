// The tab that asks a model, or two side by side, about a photo.
import { drawAnswer, drawTiming } from "./answers.js";
import { hasCamera, openCamera } from "./camera.js";
import { decode } from "./canvas.js";
import { showSamples } from "./samples.js";
import { fill, make, picture, server, showError, takeFiles, takePasted, tablist } from "./shared.js";
import { showSnippets } from "./snippets.js";

const panel = document.getElementById("try"), form = panel.querySelector("form");
const answers = document.getElementById("answers"), preview = document.getElementById("preview");
const tasks = document.getElementById("tasks"), about = document.getElementById("about");
const WAIT_MS = 250; // after typing, before the model is asked
const LIVE = "Live camera", KEEP = "Stop and keep the photo";
const LIVE_MS = 250; // from an answer to the camera's next photo
const LOADING_MS = 2000; // between looks at a server that starts
const PATCHES = "patches"; // a task of the page's own: `embed` with the patches' tokens
const NAMES = { "zero-shot": "Zero-shot", [PATCHES]: "Similar patches" };
const ORDER = ["classify", "zero-shot", "segment", "attention", PATCHES, "reconstruct", "depth", "embed", "generate"];
const FIXED = {
  segment: { output: "mask" },
  attention: { output: "npy" },
  [PATCHES]: { output: "tokens", encoding: "base64" },
};
const ABOUT = {
  classify: "The model's own classes that fit the photo best.",
  "zero-shot": "Labels of your own, with commas between them. The scores follow while you type.",
  segment: "Which pixels belong to which class.",
  attention: "Where each attention head of the last block looks, seen from the class token.",
  [PATCHES]: "Which parts of the photo the model takes for similar.",
  reconstruct: "What the model expects in the patches that are hidden from it.",
  depth: "How far away each pixel is.",
  embed: "The photo as a vector. Similar photos have similar vectors; Search finds them.",
  generate: "A picture that the model draws from noise.",
};
let models = [], task = "", file = null, photo = null, camera = null, asked = 0, timer = 0, loading = 0;

export async function show() {
  const before = models;
  let isStarting;
  try {
    isStarting = (await fetch("readyz")).status === 503;
    models = (await server().models()).filter((model) => model.state === "ready");
  } catch (error) {
    return showError(error, answers);
  }
  clearTimeout(loading);
  if (!models.length || isStarting)
    loading = setTimeout(() => panel.hidden || show(), LOADING_MS);
  if (!models.length) return answers.replaceChildren(make("p", "No model is ready yet. This page waits for one."));
  if (!before.length) answers.replaceChildren();
  else if (JSON.stringify(models) === JSON.stringify(before)) return; // the tabs keep the focus
  const offered = new Set(models.flatMap((model) => model.tasks));
  if (models.some((model) => takes(model, PATCHES))) offered.add(PATCHES);
  const place = (name) => (ORDER.indexOf(name) + ORDER.length + 1) % (ORDER.length + 1); // others come last
  const names = [...offered].sort((one, other) => place(one) - place(other));
  if (!names.includes(task)) task = names[0] ?? "";
  tasks.replaceChildren(...names.map((name) => make("button", title(name), null, {
    type: "button", role: "tab", value: name, ariaSelected: String(name === task), tabIndex: name === task ? 0 : -1,
  })));
  for (const tab of tasks.children) tab.setAttribute("aria-controls", "ask");
  tablist(tasks, (tab) => choose(tab.value));
  showOptions();
}

const title = (name) => NAMES[name] ?? name[0].toUpperCase() + name.slice(1);
const route = () => (task === PATCHES ? "embed" : task);
const part = (one) => (one.type.startsWith("video/") ? "video" : "image"); // of a request
const isDrawn = () => task === "generate"; // from noise instead of a photo

function takes(model, name) {
  if (name === PATCHES) name = "embed";
  return model.tasks.includes(name) && (name !== "embed" || Boolean(model.modalities?.includes("image")));
}

/** Whether labels are sent to a model: not to segmenters with classes of their own. */
function isPrompted(name) {
  const model = models.find((each) => each.name === name);
  return task === "zero-shot" || (task === "segment" && Boolean(model?.modalities?.includes("text")));
}

function choose(name) {
  task = name;
  answers.replaceChildren();
  showOptions();
  if (file || isDrawn()) ask();
}

function showOptions() {
  const able = models.filter((model) => takes(model, task));
  // those whose own task it is, and the server's default, first
  const rank = (model) => 2 * !model.default_for.includes(route()) + (model.task !== route());
  able.sort((one, other) => rank(one) - rank(other));
  const options = able.map((model) => [model.name, model.name]);
  fill(form.model, options);
  fill(form.other, [["none", ""], ...options]);
  for (const element of panel.querySelectorAll("[data-tasks]"))
    element.hidden = !element.dataset.tasks.split(" ").includes(task);
  about.textContent = ABOUT[task] ?? "";
  showLabels();
}

function showLabels() {
  form.labels.closest("label").hidden = ![form.model.value, form.other.value].some(isPrompted);
}

const labels = () => form.labels.value.split(",").map((label) => label.trim()).filter(Boolean);

function optionsFor(model) {
  const given = { model, ...FIXED[task] };
  if (labels().length && isPrompted(model)) given.labels = labels();
  // a slider that was not moved leaves the model's own value
  for (const control of [form.threshold, form.mask_ratio, form.seed])
    if (!control.closest("[data-tasks]").hidden && control.dataset.moved) given[control.name] = Number(control.value);
  return given;
}

async function ask() {
  clearTimeout(timer);
  if (!task) return;
  if (!file && !isDrawn()) return showError(new Error("Choose a photo first."), answers);
  const current = ++asked, names = [form.model.value, form.other.value].filter(Boolean);
  if (task === "zero-shot" && !labels().length) {
    answers.replaceChildren(make("p", "Type labels, such as: a cat, a dog, a cup of coffee."));
    return form.labels.focus();
  }
  preview.hidden = !camera && (isDrawn() || Object.hasOwn(FIXED, task)); // those are drawn on the photo
  if (!answers.querySelector("article")) answers.replaceChildren(make("p", "Waiting for the answer."));
  const articles = await Promise.all(names.map((model) => askOne(model, current)));
  if (current !== asked) return;
  // what stays in its place keeps the focus
  if (articles.some((article, place) => article !== answers.children[place]) || answers.children.length > articles.length)
    answers.replaceChildren(...articles);
}

/** The article with one model's answer: the one that is shown, if there is one. */
async function askOne(model, current) {
  const article = answers.querySelector(`[data-asked="${CSS.escape(`${task} ${model}`)}"]`) ?? newArticle(model);
  const [, answer, timing, code] = article.children;
  const given = optionsFor(model), files = isDrawn() ? [] : [file];
  try {
    const body = new FormData();
    for (const one of files) body.append(part(one), one);
    for (const [name, value] of Object.entries({ ...given, timing: true }))
      for (const item of [value].flat()) body.append(name, item);
    const began = performance.now();
    const reply = await server().send("POST", `/${route()}`, { body });
    const waited = performance.now() - began;
    if (current !== asked) return article;
    drawAnswer(task, reply, photo, answer);
    drawTiming(reply.timing, waited, timing);
  } catch (error) {
    if (current !== asked) return article;
    showError(error, answer);
    timing.replaceChildren();
  }
  const sent = files.map((one) => [part(one), one.name]);
  showSnippets(code, { path: `/${route()}`, fields: Object.entries(given), files: sent });
  return article;
}

function newArticle(model) {
  const article = make("article");
  article.dataset.asked = `${task} ${model}`;
  make("h2", model, article);
  for (const className of ["answer", "time", "snippets"]) make("div", "", article, { className });
  return article;
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, WAIT_MS);
}

async function take([first]) {
  closeCamera();
  const decoded = first.type.startsWith("image/") ? await decode(first) : null;
  [file, photo] = [first, decoded];
  preview.replaceChildren();
  if (photo) picture(file, "Your photo", preview);
  else make("p", file.name, preview);
  ask();
}

/** Ask about what the camera sees, one request at a time, until it is closed. */
async function watch() {
  preview.hidden = false;
  form.live.disabled = true; // while the browser asks for permission
  try {
    camera = await openCamera(preview);
  } catch (error) {
    return showError(new Error(`The camera cannot be used: ${error.message}`), answers);
  } finally {
    form.live.disabled = false;
  }
  const own = camera;
  form.live.textContent = KEEP;
  answers.ariaLive = "off"; // or a screen reader would never be silent
  while (camera === own) {
    if (panel.hidden) return keep();
    if (!document.hidden) {
      const shot = await own.grab(), decoded = await decode(shot);
      if (camera !== own) return;
      [file, photo] = [shot, decoded];
      await ask();
    }
    await new Promise((resolve) => setTimeout(resolve, LIVE_MS));
  }
}

/** Close the camera; its last photo stays. */
function keep() {
  if (file) take([file]);
  else closeCamera();
}

function closeCamera() {
  camera?.stop();
  camera = null;
  form.live.textContent = LIVE;
  answers.ariaLive = "polite";
}

for (const element of panel.querySelectorAll(".drop, .camera")) takeFiles(element, take);
takeFiles(document.getElementById("result"), take);
takePasted(panel, take);
showSamples(document.getElementById("samples"), take);
form.live.hidden = !hasCamera();
form.live.addEventListener("click", () => (camera ? keep() : watch()));
for (const select of [form.model, form.other])
  select.addEventListener("change", () => {
    for (const control of [form.threshold, form.mask_ratio]) {
      delete control.dataset.moved;
      control.nextElementSibling.value = "the model's";
    }
    showLabels();
    if (file || isDrawn()) ask();
  });
for (const control of [form.labels, form.threshold, form.mask_ratio, form.seed])
  control.addEventListener("input", () => {
    control.dataset.moved = "yes";
    if (control.type === "range") control.nextElementSibling.value = control.value;
    if (file) soon();
  });
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
