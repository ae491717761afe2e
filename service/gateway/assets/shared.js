// What the tabs share: the client, elements, and dropping of files.
import { Vitrail } from "./vitrail.js";

export const key = () => document.getElementById("key").value;
export const server = () => new Vitrail("", { key: key() });

/** A GET of what is not JSON; throws if it is refused. */
export async function get(path) {
  const response = await fetch(path, { headers: key() ? { Authorization: `Bearer ${key()}` } : {} });
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return response;
}

/** A new element. Its text is never read as HTML: labels and errors are other people's words. */
export function make(tag, text = "", parent = null, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(text);
  parent?.append(element);
  return element;
}

export function picture(source, alt, parent) {
  return make("img", "", parent, { src: typeof source === "string" ? source : URL.createObjectURL(source), alt });
}

/** An error in words. The server's say how programs send a key, which is not how it is done here. */
export function explain(error) {
  const needsKey = [401, 403].includes(error.status);
  return needsKey ? `${error.message} Here, keys go into the field at the top of the page.` : error.message;
}

export function showError(error, parent) {
  parent.replaceChildren(make("p", explain(error), null, { className: "error" }));
}

/** Call `take` with the files that are dropped on an element or chosen in its input. */
export function takeFiles(element, take) {
  const input = element.querySelector("input[type=file]");
  input?.addEventListener("change", () => input.files.length && take([...input.files]));
  for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
    element.addEventListener(type, (event) => {
      event.preventDefault();
      element.classList.toggle("over", over);
      const files = [...(event.dataTransfer?.files ?? [])];
      if (type === "drop" && files.length) take(files);
    });
}

export function bars(predictions, parent) {
  for (const { label, score } of predictions) {
    const bar = make("div", "", parent, { className: "bar" });
    make("i", "", bar).style.width = `${Math.max(0, score) * 100}%`;
    const line = make("span", "", bar);
    make("b", label, line);
    make("span", `${(score * 100).toFixed(1)} %`, line);
  }
}

/** Tabs that are clicked, or chosen with the arrow keys; `open` gets the chosen one. */
export function tablist(parent, open) {
  const tabs = [...parent.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const other of tabs) {
      other.ariaSelected = String(other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    open(tab);
  };
  for (const [place, tab] of tabs.entries()) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(place + step + tabs.length) % tabs.length];
      next.focus();
      select(next);
    });
  }
  return select;
}

/** Fill a select with options, keeping what was selected. */
export function fill(select, options) {
  const selected = select.value;
  select.replaceChildren(...options.map(([text, value]) => new Option(text, value)));
  if (options.some(([, value]) => value === selected)) select.value = selected;
}
