// The tab that asks a model, or two side by side, about a photo.
import { drawAnswer, drawTiming } from "./answers.js";
import { decode } from "./canvas.js";
import { explain, fill, make, picture, server, showError, takeFiles, tablist } from "./shared.js";
import { showSnippets } from "./snippets.js";

const panel = document.getElementById("try"), form = panel.querySelector("form");
const answers = document.getElementById("answers"), preview = document.getElementById("preview");
const tasks = document.getElementById("tasks");
const WAIT_MS = 250;
const PATCHES = "patches"; // a task of the page's own: `embed` with the patches' tokens
const NAMES = { "zero-shot": "Zero-shot", [PATCHES]: "Similar patches" };
const ORDER = ["classify", "zero-shot", "segment", "attention", PATCHES, "reconstruct", "depth", "embed", "generate"];
const FIXED = {
  segment: { output: "mask" },
  attention: { output: "npy" },
  [PATCHES]: { output: "tokens", encoding: "base64" },
};
let models = [], task = "", file = null, photo = null, asked = 0, timer = 0;

export async function show() {
  try {
    models = (await server().models()).filter((model) => model.state === "ready");
  } catch (error) {
    return showError(error, answers);
  }
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
  fill(form.other, [["nothing else", ""], ...options]);
  for (const element of panel.querySelectorAll("[data-tasks]"))
    element.hidden = !element.dataset.tasks.split(" ").includes(task);
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
  preview.hidden = isDrawn() || [...Object.keys(FIXED)].includes(task); // those are drawn on the photo
  const articles = await Promise.all(names.map((model) => askOne(model, current)));
  if (current === asked) answers.replaceChildren(...articles);
}

/** The article with one model's answer. */
async function askOne(model, current) {
  const article = make("article"), given = optionsFor(model), files = isDrawn() ? [] : [file];
  make("h2", model, article);
  try {
    const body = new FormData();
    for (const one of files) body.append(one.type.startsWith("video/") ? "video" : "image", one);
    for (const [name, value] of Object.entries({ ...given, timing: true }))
      for (const item of [value].flat()) body.append(name, item);
    const began = performance.now();
    const reply = await server().send("POST", `/${route()}`, { body });
    const waited = performance.now() - began;
    if (current !== asked) return article;
    drawAnswer(task, reply, photo, article);
    drawTiming(reply.timing, waited, article);
  } catch (error) {
    make("p", explain(error), article, { className: "error" });
  }
  const sent = files.map((one) => ["image", one.name]);
  const call = `task("${route()}", [${files.length ? "file" : ""}], ${JSON.stringify(given)})`;
  showSnippets(make("div", "", article), { path: `/${route()}`, fields: Object.entries(given), files: sent, call });
  return article;
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, WAIT_MS);
}

async function take([first]) {
  file = first;
  photo = file.type.startsWith("image/") ? await decode(file) : null;
  preview.replaceChildren();
  if (photo) picture(file, "Your photo", preview);
  else make("p", file.name, preview);
  ask();
}

for (const element of panel.querySelectorAll(".drop, .camera")) takeFiles(element, take);
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length && !panel.hidden) take(files);
});
form.sample.addEventListener("click", async () => {
  const content = await (await fetch("sample.jpg")).blob();
  take([new File([content], "sample.jpg", { type: "image/jpeg" })]);
});
for (const select of [form.model, form.other])
  select.addEventListener("change", () => {
    for (const control of [form.threshold, form.mask_ratio]) delete control.dataset.moved;
    showLabels();
    if (file || isDrawn()) ask();
  });
for (const control of [form.labels, form.threshold, form.mask_ratio, form.seed])
  control.addEventListener("input", () => {
    control.dataset.moved = "yes";
    if (file) soon();
  });
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
