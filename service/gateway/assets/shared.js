// What the tabs share: the client, elements, and dropping of files.
import { Vitrail } from "./vitrail.js";

export const server = () => new Vitrail("", { key: document.getElementById("key").value });

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

export function showError(error, parent) {
  parent.replaceChildren(make("p", error.message, null, { className: "error" }));
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

/** Fill a select with options, keeping what was selected. */
export function fill(select, options) {
  const selected = select.value;
  select.replaceChildren(...options.map(([text, value]) => new Option(text, value)));
  if (options.some(([, value]) => value === selected)) select.value = selected;
}
