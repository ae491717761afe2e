// The tab that shows the models' state, and loads and unloads them.
import { refresh } from "./live.js";
import { make, server, showError } from "./shared.js";

const panel = document.getElementById("models"), rows = panel.querySelector("tbody");
const problem = document.getElementById("models-error");
const REFRESH_MS = 2000;
let timer = 0, shown = "";

export async function show() {
  clearTimeout(timer);
  refresh();
  try {
    const models = await server().models(), described = JSON.stringify(models);
    if (described !== shown) draw(models);
    shown = described;
  } catch (error) {
    showError(error, problem);
  }
  if (!panel.hidden) timer = setTimeout(() => panel.hidden || show(), REFRESH_MS);
}

/** Draw all rows; a button keeps the focus. */
function draw(models) {
  const focused = rows.contains(document.activeElement) ? document.activeElement.dataset.model : null;
  rows.replaceChildren(...models.map(row));
  rows.querySelector(`[data-model="${CSS.escape(focused ?? "")}"]`)?.focus();
}

function row(model) {
  const line = make("tr"), memory = model.memory_bytes ? `${(model.memory_bytes / 2 ** 20).toFixed(0)} MiB` : "";
  const engine = [model.engine, model.precision, model.device].filter(Boolean).join(", ");
  for (const text of [model.name, model.state]) make("td", text, line);
  if (model.reason) line.title = model.reason;
  const loaded = model.state === "ready";
  const button = make("button", loaded ? "Unload" : "Load", make("td", "", line), { type: "button" });
  for (const text of [model.task, engine, memory]) make("td", text, line);
  button.dataset.model = model.name;
  button.setAttribute("aria-label", `${button.textContent} ${model.name}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    problem.replaceChildren();
    try {
      await server().send("POST", `/models/${encodeURIComponent(model.name)}/${loaded ? "unload" : "load"}`);
    } catch (error) {
      showError(error, problem);
    }
    shown = ""; // the button is enabled again
    show();
  });
  return line;
}
