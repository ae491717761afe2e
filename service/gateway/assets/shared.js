// What the tabs share: the client, elements, and dropping of files.
import { Vitrail } from "./vitrail.js";

const MOVE_MS = 250;
const UNREACHED = /fetch|network|load failed/i; // how browsers say that a server did not answer

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

/** An error in words. The server's say how programs send a key, not where it goes on this page. */
export function explain(error) {
  if (error instanceof TypeError && UNREACHED.test(error.message)) return "The server does not answer.";
  const needsKey = [401, 403].includes(error.status);
  return needsKey ? `${error.message}. A key goes into the field at the top of the page.` : error.message;
}

export function showError(error, parent) {
  parent.replaceChildren(make("p", explain(error), null, { className: "error" }));
}

/** Call `take` with the files that are dropped on an element, in folders, too, or chosen in its input. */
export function takeFiles(element, take) {
  const input = element.querySelector("input[type=file]");
  input?.addEventListener("change", () => input.files.length && take([...input.files]));
  for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
    element.addEventListener(type, async (event) => {
      event.preventDefault();
      element.classList.toggle("over", over);
      if (type !== "drop") return;
      // only now, before the first `await`, can the entries be read
      const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
      const files = (await Promise.all(entries.map(filesOf))).flat();
      if (files.length) take(files);
    });
}

/** Call `take` with the files that are pasted while a tab is open. */
export function takePasted(panel, take) {
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length && !panel.hidden) take(files);
  });
}

/** The files of what was dropped, with their `path`: of a file itself, of a folder all in it. */
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [Object.assign(file, { path: entry.fullPath.slice(1) })];
  }
  const reader = entry.createReader(), inside = [];
  for (;;) { // it gives some at a time
    const more = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!more.length) return (await Promise.all(inside.map(filesOf))).flat();
    inside.push(...more);
  }
}

/** Labels with their scores as bars. Those that are there already move to their new scores. */
export function bars(predictions, parent) {
  const list = parent.querySelector(":scope > .bars") ?? make("div", "", parent, { className: "bars" });
  const before = new Map([...list.children].map((bar) => [bar.dataset.label, bar.querySelector("i").style.width]));
  list.replaceChildren(...predictions.map(({ label, score }) => {
    const bar = make("div", "", null, { className: "bar" }), filled = make("i", "", bar), line = make("span", "", bar);
    const width = `${Math.max(0, score) * 100}%`;
    bar.dataset.label = label;
    filled.style.width = width;
    if (before.has(label) && !matchMedia("(prefers-reduced-motion: reduce)").matches)
      filled.animate([{ width: before.get(label) }, { width }], MOVE_MS);
    make("b", label, line);
    make("span", `${(score * 100).toFixed(1)} %`, line);
    return bar;
  }));
}

/** Tabs that are clicked, or chosen with the arrow keys; `open` gets the chosen one. */
export function tablist(parent, open) {
  const tabs = [...parent.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const other of tabs) {
      other.ariaSelected = String(other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    open(tab);
  };
  for (const [place, tab] of tabs.entries()) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1 }[event.key];
      if (next === undefined) return;
      event.preventDefault(); // the page would scroll
      const chosen = tabs.at(next % tabs.length);
      chosen.focus();
      select(chosen);
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
