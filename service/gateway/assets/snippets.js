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
 * Texts by language of a POST request. Each is a whole program, for files in its folder.
 * @param {{ path: string, fields?: [string, any][], files?: [string, string][], json?: object }} request
 *   `fields` and `files` (field and file name) of a form, or `json`
 */
export function snippets({ path, fields = [], files = [], json }) {
  const url = location.origin + path, few = files.slice(0, SHOWN_FILES);
  const others = files.length > SHOWN_FILES ? `and ${files.length - SHOWN_FILES} more files` : "";
  const flat = fields.flatMap(([name, value]) => [value].flat().map((item) => [name, item]));
  return {
    curl: curl(url, flat, few, json, others && ` # ${others}`),
    Python: inPython(url, flat, few, json, others && `  # ${others}`),
    JavaScript: inJavaScript(url, flat, few, json, others && ` // ${others}`),
  };
}

function curl(url, fields, files, json, comment) {
  // in double quotes, or `,` and `;` would end a file's name; plain -F would read more than text in a value
  const opened = files.map(([name, file]) => ` -F ${quoted(`${name}=@"${file.replace(/["\\]/g, "\\$&")}"`)}`);
  const body = json ? ` --json ${quoted(JSON.stringify(json))}`
    : [...opened, ...fields.map(([name, value]) => ` --form-string ${quoted(`${name}=${value}`)}`)].join("");
  return `curl${key() ? ` -H "Authorization: Bearer $VITRAIL_API_KEY"` : ""}${body} ${url}${comment}`;
}

function inPython(url, fields, files, json, comment) {
  const names = new Map();
  for (const [name, value] of fields) names.set(name, [...(names.get(name) ?? []), value]);
  const data = python(Object.fromEntries([...names].map(([name, values]) => [name, values.length > 1 ? values : values[0]])));
  const opened = files.map(([name, file]) => `(${JSON.stringify(name)}, open(${JSON.stringify(file)}, "rb"))`).join(", ");
  const sent = json ? `json=${python(json)}` : files.length ? `files=[${opened}], data=${data}` : `json=${data}`;
  const headers = key() ? `, headers={"Authorization": f"Bearer {os.environ['VITRAIL_API_KEY']}"}` : "";
  return `${key() ? "import os\n\n" : ""}import httpx\n\n` +
    `answer = httpx.post("${url}", ${sent}${headers}, timeout=60).json()${comment}\nprint(answer)`;
}

function inJavaScript(url, fields, files, json, comment) {
  const lines = files.length ? [`import { readFile } from "node:fs/promises"; // in a page: a File of an <input>`, ""] : [];
  if (!json) lines.push("const body = new FormData();");
  for (const [name, file] of files)
    lines.push(`body.append(${JSON.stringify(name)}, new Blob([await readFile(${JSON.stringify(file)})]), ${JSON.stringify(file)});`);
  if (comment) lines.push(comment.trim());
  if (!json) for (const [name, value] of fields) lines.push(`body.append(${JSON.stringify(name)}, ${JSON.stringify(String(value))});`);
  const headers = [
    ...(key() ? ["Authorization: `Bearer ${process.env.VITRAIL_API_KEY}`"] : []),
    ...(json ? ['"Content-Type": "application/json"'] : []),
  ];
  const body = json ? `body: JSON.stringify(${JSON.stringify(json)})` : "body";
  const options = ['method: "POST"', ...(headers.length ? [`headers: { ${headers.join(", ")} }`] : []), body];
  lines.push(`const answer = await fetch("${url}", { ${options.join(", ")} });`, "console.log(await answer.text());");
  return lines.join("\n");
}

let language = "curl"; // the one that was chosen last

/** Show them, one language at a time. */
export function showSnippets(parent, request) {
  const texts = snippets(request);
  if (parent.dataset.shown === texts.curl) return; // buttons keep the focus
  parent.dataset.shown = texts.curl;
  const code = make("pre", "", null, { tabIndex: 0, role: "group", ariaLabel: "The request as code" });
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
