// The tab that asks a model about a photo.
import { bars, fill, make, picture, server, showError, takeFiles } from "./shared.js";
import { showSnippets, snippets } from "./snippets.js";

const panel = document.getElementById("try"), form = panel.querySelector("form");
const answer = document.getElementById("answer"), timing = document.getElementById("timing");
const SHOWN = ["attention", "reconstruct", "depth"]; // beside each model's own task
const WAIT_MS = 250;
let file = null, asked = 0, timer = 0;

export async function show() {
  const options = [];
  try {
    for (const model of await server().models())
      if (model.state === "ready")
        for (const task of model.tasks.filter((task) => task === model.task || SHOWN.includes(task)))
          options.push([`${task}: ${model.name}`, `${task} ${model.name}`]);
  } catch (error) {
    showError(error, answer);
  }
  fill(form.model, options);
  showOptions();
}

const selected = () => form.model.value.split(" ");

function showOptions() {
  const [task] = selected();
  form.labels.hidden = !["zero-shot", "segment"].includes(task);
  panel.querySelector(".threshold").hidden = task !== "segment";
}

function options(task, model) {
  const labels = form.labels.value.split(",").map((label) => label.trim()).filter(Boolean);
  return {
    model,
    ...(task === "segment" ? { output: "overlay", threshold: Number(form.threshold.value) } : {}),
    ...(labels.length && !form.labels.hidden ? { labels } : {}),
  };
}

async function ask() {
  const [task, model] = selected(), current = ++asked;
  const draws = task === "generate";
  if (!task) return;
  if (!file && !draws) return showError(new Error("Choose a photo first."), answer);
  const given = options(task, model);
  showSnippets(document.getElementById("snippets"), snippets(location.origin, task, given, draws ? "" : file.name));
  try {
    const body = new FormData();
    if (!draws) body.append(file.type.startsWith("video/") ? "video" : "image", file);
    for (const [name, value] of Object.entries({ ...given, timing: true }))
      for (const item of [value].flat()) body.append(name, item);
    const reply = await server().send("POST", `/${task}`, { body });
    if (current === asked) draw(reply, draws);
  } catch (error) {
    if (current === asked) showError(error, answer);
  }
}

function draw(reply, draws) {
  const figure = make("figure"), column = make("div"), [result] = reply.results;
  answer.replaceChildren(figure, column);
  if (!draws && file.type.startsWith("image/")) picture(file, "Your photo", figure);
  if (result.error) return make("p", result.error.detail, column, { className: "error" });
  for (const name of ["mask", "attention", "depth", "image", "seen", "drawn", "pasted"])
    if (typeof result[name] === "string") picture(`data:image/png;base64,${result[name]}`, name, figure);
  bars(result.predictions ?? [], column);
  if (Array.isArray(result.embedding)) {
    const numbers = result.embedding.map((value) => value.toFixed(4)).join(" ");
    make("pre", `${reply.dimensions} dimensions\n${numbers}`, column, { tabIndex: 0 });
  }
  const pixels = result.width * result.height;
  for (const found of result.classes ?? [])
    make("p", `${found.label}: ${((100 * found.pixels) / pixels).toFixed(1)} %`, column);
  const { decode, queue, compute, total } = reply.timing;
  timing.textContent = `decode ${decode} ms, queue ${queue} ms, compute ${compute} ms, in all ${total} ms`;
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, WAIT_MS);
}

function take([first]) {
  file = first;
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
form.model.addEventListener("change", () => {
  showOptions();
  if (file) ask();
});
for (const control of [form.labels, form.threshold])
  control.addEventListener("input", () => file && soon());
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
