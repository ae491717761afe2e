// The same request as curl, Python and JavaScript.
import { make } from "./shared.js";

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const python = (value) => value === true ? "True" : value === false ? "False" : JSON.stringify(value);

/** Texts by language: `task` with `options` for a file of that name, or for none. */
export function snippets(origin, task, options, file) {
  const given = Object.entries(options);
  const fields = given.flatMap(([name, value]) => [value].flat().map((item) => ` -F ${quoted(`${name}=${item}`)}`));
  const body = `{${given.map(([name, value]) => `"${name}": ${python(value)}`).join(", ")}}`;
  return {
    curl: `curl${file ? ` -F ${quoted(`image=@${file}`)}` : ""}${fields.join("")} ${origin}/${task}`,
    Python: file
      ? `import httpx\n\nfiles = {"image": open(${JSON.stringify(file)}, "rb")}\n` +
        `answer = httpx.post("${origin}/${task}", files=files, data=${body}).json()`
      : `import httpx\n\nanswer = httpx.post("${origin}/${task}", json=${body}).json()`,
    JavaScript: `import { Vitrail } from "${origin}/assets/vitrail.js";\n\n` +
      `const [entry] = await new Vitrail("${origin}").task("${task}", [${file ? "file" : ""}], ${JSON.stringify(options)});`,
  };
}

/** Show them, one language at a time. */
export function showSnippets(parent, texts) {
  const code = make("pre", "", null, { tabIndex: 0 });
  const buttons = Object.entries(texts).map(([language, text]) => {
    const button = make("button", language, null, { type: "button" });
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      code.textContent = text;
    });
    return button;
  });
  const copy = make("button", "Copy", null, { type: "button" });
  copy.addEventListener("click", () => navigator.clipboard?.writeText(code.textContent));
  parent.replaceChildren(...buttons, copy, code);
  parent.hidden = false;
  buttons[0].click();
}
