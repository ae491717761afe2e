// The same request as curl, Python and JavaScript.
import { key, make } from "./shared.js";

export const SHOWN_FILES = 4; // more are left out
const COPIED_MS = 1500;
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** A value as Python writes it. */
function python(value) {
  if (value === true || value === false) return value ? "True" : "False";
  if (value === null || value === undefined) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item)}`).join(", ")}}`;
}

/**
 * Texts by language of a POST request.
 * @param {{ path: string, fields?: [string, any][], files?: [string, string][], json?: object, call: string }} request
 *   `fields` and `files` (field and file name) of a form, or `json`; `call` of the JavaScript client
 */
export function snippets({ path, fields = [], files = [], json, call }) {
  const url = location.origin + path, few = files.slice(0, SHOWN_FILES);
  const others = files.length > SHOWN_FILES ? ` # and ${files.length - SHOWN_FILES} more files` : "";
  const flat = fields.flatMap(([name, value]) => [value].flat().map((item) => [name, item]));
  const parts = [...few.map(([name, file]) => [name, `@${file}`]), ...flat].map(([name, value]) => ` -F ${quoted(`${name}=${value}`)}`);
  const curlKey = key() ? ` -H "Authorization: Bearer $VITRAIL_KEY"` : "";
  const pythonKey = key() ? `, headers={"Authorization": f"Bearer {key}"}` : "";
  const body = json ? ` --json ${quoted(JSON.stringify(json))}` : parts.join("");
  const names = new Map();
  for (const [name, value] of flat) names.set(name, [...(names.get(name) ?? []), value]);
  const data = Object.fromEntries([...names].map(([name, values]) => [name, values.length > 1 ? values : values[0]]));
  const opened = few.map(([name, file]) => `(${JSON.stringify(name)}, open(${JSON.stringify(file)}, "rb"))`).join(", ");
  const sent = json ? `json=${python(json)}` : few.length ? `files=[${opened}], data=${python(data)}` : `json=${python(data)}`;
  const keyed = key() ? `, { key }` : "";
  return {
    curl: `curl${curlKey}${body} ${url}${others}`,
    Python: `import httpx\n\nanswer = httpx.post("${url}", ${sent}${pythonKey}).json()${others}`,
    JavaScript: `import { Vitrail } from "${location.origin}/assets/vitrail.js";\n\n` +
      `const answer = await new Vitrail("${location.origin}"${keyed}).${call};${others.replace("#", "//")}`,
  };
}

let language = "curl"; // the one that was chosen last

/** Show them, one language at a time. */
export function showSnippets(parent, request) {
  const texts = snippets(request);
  if (parent.dataset.shown === texts.curl) return; // buttons keep the focus
  parent.dataset.shown = texts.curl;
  const code = make("pre", "", null, { tabIndex: 0, role: "region", ariaLabel: "The request as code" });
  const buttons = Object.keys(texts).map((name) => make("button", name, null, { type: "button" }));
  const choose = (name) => {
    language = name;
    for (const button of buttons) button.ariaPressed = String(button.textContent === name);
    code.textContent = texts[name];
  };
  for (const button of buttons) button.addEventListener("click", () => choose(button.textContent));
  parent.className = "snippets";
  parent.replaceChildren(...buttons, ...(navigator.clipboard ? [copyButton(code)] : []), code);
  choose(language);
}

function copyButton(code) {
  const button = make("button", "Copy", null, { type: "button" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), COPIED_MS);
  });
  return button;
}
