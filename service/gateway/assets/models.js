// The tab that shows the models' state, and loads and unloads them.
import { make, server, showError } from "./shared.js";

const panel = document.getElementById("models"), rows = panel.querySelector("tbody");
const problem = document.getElementById("models-error");
const REFRESH_MS = 3000;
let timer = 0;

export async function show() {
  clearTimeout(timer);
  try {
    rows.replaceChildren(...(await server().models()).map(row));
  } catch (error) {
    showError(error, problem);
  }
  if (!panel.hidden) timer = setTimeout(() => panel.hidden || show(), REFRESH_MS);
}

function row(model) {
  const line = make("tr"), memory = model.memory_bytes ? `${(model.memory_bytes / 2 ** 20).toFixed(0)} MiB` : "";
  const engine = [model.engine, model.precision, model.device].filter(Boolean).join(", ");
  for (const text of [model.name, model.task, model.state, engine, memory]) make("td", text, line);
  if (model.reason) line.title = model.reason;
  const loaded = model.state === "ready";
  const button = make("button", loaded ? "Unload" : "Load", make("td", "", line), { type: "button" });
  button.setAttribute("aria-label", `${button.textContent} ${model.name}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    problem.replaceChildren();
    try {
      await server().send("POST", `/models/${encodeURIComponent(model.name)}/${loaded ? "unload" : "load"}`);
    } catch (error) {
      showError(error, problem);
    }
    show();
  });
  return line;
}
