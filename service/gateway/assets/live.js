// What the server does at the moment, from its metrics: rates, queues, batches.
import { drawLine } from "./canvas.js";
import { get, make } from "./shared.js";

const list = document.getElementById("live"), problem = document.getElementById("live-error");
const POINTS = 60, WIDTH = 180, HEIGHT = 36;
const history = new Map(); // the last values of each line
let before = null;

/** Samples of Prometheus' text format, summed over labels: by name. */
function read(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const [, name, value] = line.match(/^(\w+)(?:\{.*\})? (\S+)$/) ?? [];
    if (name) sums.set(name, (sums.get(name) ?? 0) + Number(value));
  }
  return sums;
}

/** Ask for the metrics once, and draw what has changed since the last time. */
export async function refresh() {
  try {
    const now = { at: performance.now(), sums: read(await (await get("metrics")).text()) };
    const value = (name) => now.sums.get(name) ?? 0;
    const grown = (name) => (before ? value(name) - (before.sums.get(name) ?? 0) : 0);
    const seconds = before ? (now.at - before.at) / 1000 : 1;
    const batches = grown("vitrail_batch_size_count");
    draw("requests a second", grown("vitrail_requests_total") / seconds);
    draw("images a second", grown("vitrail_images_total") / seconds);
    draw("images in the queue", value("vitrail_queue_depth") + value("vitrail_decode_queue_depth"));
    draw("images in a batch", batches ? grown("vitrail_batch_size_sum") / batches : 0);
    draw("batches on the device", value("vitrail_inflight_batches"));
    before = now;
    problem.textContent = "";
  } catch (error) {
    problem.textContent = `The metrics cannot be read here: ${error.message}`;
  }
}

function draw(name, value) {
  const values = [...(history.get(name) ?? []), value].slice(-POINTS);
  history.set(name, values);
  let line = list.querySelector(`[data-name="${name}"]`);
  if (!line) {
    line = make("div", "", list);
    line.dataset.name = name;
    make("dt", name, line);
    make("dd", "", line);
    make("canvas", "", line, { width: WIDTH, height: HEIGHT, ariaHidden: "true" });
  }
  line.querySelector("dd").textContent = value.toFixed(Number.isInteger(value) ? 0 : 1);
  const all = Array(POINTS - values.length).fill(0).concat(values); // the newest is at the right
  drawLine(line.querySelector("canvas"), all, Math.max(1, ...values));
}
