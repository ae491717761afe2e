// How each task's answer is shown, and where its time went.
import { drawAttention } from "./attention.js";
import { drawPatches } from "./patches.js";
import { drawSegments } from "./segments.js";
import { bars, make, picture } from "./shared.js";

const DRAWN = { segment: drawSegments, attention: drawAttention, patches: drawPatches };
const PICTURES = ["depth", "image", "seen", "drawn", "pasted"];

/** Draw an answer about a photo in an element; `photo` is null where the browser cannot show it. */
export function drawAnswer(task, reply, photo, parent) {
  const [result] = reply.results;
  if (result.error) throw new Error(result.error.detail);
  if (result.predictions) {
    for (const child of [...parent.children]) if (child.className !== "bars") child.remove(); // an error
    return bars(result.predictions, parent);
  }
  parent.replaceChildren();
  (DRAWN[task] ?? drawOther)(result, photo, parent);
}

function drawOther(result, photo, parent) {
  for (const name of PICTURES)
    if (typeof result[name] === "string") {
      const figure = make("figure", "", parent);
      picture(`data:image/png;base64,${result[name]}`, name, figure);
      make("figcaption", name, figure);
    }
  if (Array.isArray(result.embedding)) {
    const numbers = result.embedding.map((value) => value.toFixed(4)).join(" ");
    make("pre", `${result.embedding.length} dimensions\n${numbers}`, parent, { tabIndex: 0, role: "group", ariaLabel: "Embedding" });
  }
}

/** The server's stages and the rest of the time that the page waited, as a bar and in words. */
export function drawTiming({ decode, queue, compute, total }, waited, parent) {
  const stages = { decode, queue, compute, other: total - decode - queue - compute, network: waited - total };
  parent.replaceChildren();
  const bar = make("div", "", parent, { className: "times" });
  for (const [name, time] of Object.entries(stages))
    make("i", "", bar, { className: name, title: name }).style.flexGrow = Math.max(0, time);
  const words = Object.entries(stages).map(([name, time]) => `${name} ${Math.max(0, time).toFixed(1)}`).join(", ");
  make("p", `${words}: ${waited.toFixed(1)} ms in all`, parent, { className: "timing" });
}
