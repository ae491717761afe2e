// The patches of a photo that are like the one that is pointed at.
import { drawHeat, photoCanvas } from "./canvas.js";
import { readVector } from "./npy.js";
import { make } from "./shared.js";

const WIDTH = 960, NEAREST = 5;
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export function drawPatches({ tokens, grid, region }, photo, parent) {
  if (!grid) throw new Error("The model's tokens are not the patches of one image.");
  const vectors = tokens.map(readVector), [rows, columns] = grid, [left, top, right, bottom] = region;
  const across = (right - left) / columns, down = (bottom - top) / rows;
  const size = photo ? [photo.width, photo.height] : [right, bottom];
  make("p", "Click a patch, or move with the arrow keys: bright patches are like it.", parent);
  const { canvas, context } = photoCanvas(photo, ...size, WIDTH, make("figure", "", parent));
  const said = make("p", "", parent, { className: "nearest" });
  Object.assign(canvas, { tabIndex: 0, role: "application", ariaLabel: "Patches; arrow keys choose one" });
  let chosen = [rows >> 1, columns >> 1];

  const outline = (cell, colour, thickness) => {
    context.strokeStyle = colour;
    context.lineWidth = (thickness * size[0]) / canvas.width;
    context.strokeRect(left + (cell % columns) * across, top + Math.floor(cell / columns) * down, across, down);
  };
  const draw = () => {
    const place = chosen[0] * columns + chosen[1], own = vectors[place];
    // the vectors are of unit length
    const cosines = vectors.map((vector) => vector.reduce((sum, value, at) => sum + value * own[at], 0));
    const order = [...cosines.keys()].filter((cell) => cell !== place).sort((a, b) => cosines[b] - cosines[a]);
    if (photo) context.drawImage(photo, 0, 0, ...size);
    drawHeat(context, cosines.map((value) => Math.max(0, value)), grid, region);
    for (const cell of order.slice(0, NEAREST)) outline(cell, "#00e5ff", 2);
    outline(place, "#fff", 3);
    const nearest = order.slice(0, NEAREST).map((cell) =>
      `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1} (${cosines[cell].toFixed(2)})`);
    said.textContent = `Row ${chosen[0] + 1}, column ${chosen[1] + 1} of ${rows} x ${columns}. Most similar: ${nearest.join("; ")}.`;
  };
  const choose = (row, column) => {
    chosen = [Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1)];
    draw();
  };
  canvas.addEventListener("click", (event) => {
    const x = (event.offsetX / canvas.clientWidth) * size[0], y = (event.offsetY / canvas.clientHeight) * size[1];
    choose(Math.floor((y - top) / down), Math.floor((x - left) / across));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    choose(chosen[0] + step[0], chosen[1] + step[1]);
  });
  draw();
}
