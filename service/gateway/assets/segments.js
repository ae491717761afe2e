// A mask over its photo: opacity, and a switch for each class.
import { colour, photoCanvas } from "./canvas.js";
import { readNpy } from "./npy.js";
import { make } from "./shared.js";

const NOTHING = ["background", "unlabelled"]; // classes that are not shown at first
const WIDTH = 1600;
const shown = new Map(); // what was switched, and the opacity, stay as they are when the mask changes
let opacity = 0.6;

export function drawSegments({ width, height, classes, mask }, photo, parent) {
  const { data } = readNpy(mask);
  const figure = make("figure", "", parent, { className: "layers" });
  photoCanvas(photo, width, height, WIDTH, figure);
  const { canvas } = photoCanvas(null, width, height, Infinity, figure);
  canvas.setAttribute("role", "img");
  canvas.ariaLabel = `mask of ${classes.map(({ label }) => label).join(", ")}`;
  const context = canvas.getContext("2d");

  const slider = make("label", "Opacity ", parent);
  const range = make("input", "", slider, { type: "range", min: 0, max: 1, step: 0.05, value: opacity });
  const see = () => (canvas.style.opacity = opacity = range.value);
  range.addEventListener("input", see);
  see();

  const isShown = ({ label }) => shown.get(label) ?? !NOTHING.includes(label);
  const paint = () => {
    const pixels = new ImageData(width, height), words = new Uint32Array(pixels.data.buffer);
    const colours = new Map(classes.filter(isShown).map(({ index }) => {
      const [red, green, blue] = colour(index);
      return [index, ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0]; // bytes in memory: RGBA
    }));
    for (let place = 0; place < data.length; place++) words[place] = colours.get(data[place]) ?? 0;
    context.putImageData(pixels, 0, 0);
  };
  const list = make("ul", "", parent, { className: "legend" });
  for (const found of [...classes].sort((one, other) => other.pixels - one.pixels)) {
    const line = make("label", "", make("li", "", list));
    const box = make("input", "", line, { type: "checkbox", checked: isShown(found) });
    make("i", "", line).style.background = `rgb(${colour(found.index)})`;
    line.append(` ${found.label}: ${((100 * found.pixels) / (width * height)).toFixed(1)} %`);
    box.addEventListener("change", () => {
      shown.set(found.label, box.checked);
      paint();
    });
  }
  paint();
}
