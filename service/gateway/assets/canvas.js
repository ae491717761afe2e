// Photos on canvases, and maps over them.
import { make } from "./shared.js";

/** The photo of a file as the server sees it, turned as its EXIF says; null if this browser cannot read it. */
export const decode = (file) => createImageBitmap(file).catch(() => null);

/** A canvas with a photo of the server's size, at most `limit` pixels wide, in whose pixels it is drawn on. */
export function photoCanvas(photo, width, height, limit, parent) {
  const scale = Math.min(1, limit / width);
  const canvas = make("canvas", "", parent, { width: Math.round(width * scale), height: Math.round(height * scale) });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  if (photo) context.drawImage(photo, 0, 0, width, height);
  return { canvas, context };
}

/** Colours for values (rows x columns, 0 to 1) over the region of the photo that they cover. */
export function drawHeat(context, values, [rows, columns], [left, top, right, bottom]) {
  const cells = new ImageData(columns, rows);
  for (let cell = 0; cell < rows * columns; cell++) {
    const value = values[cell];
    cells.data.set([255 * Math.sqrt(value), 255 * value ** 2, 110 * (1 - value), 170], 4 * cell);
  }
  const small = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  small.getContext("2d").putImageData(cells, 0, 0);
  context.drawImage(small, left, top, right - left, bottom - top);
}

/** Values scaled so that the least is 0 and the largest 1. */
export function scaled(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return Float32Array.from(values, (value) => (value - low) / Math.max(high - low, 1e-12));
}

/** A class's colour, [red, green, blue], far from those of its neighbours: the golden angle apart. */
export function colour(index) {
  return [0, 8, 4].map((part) => {
    const hue = (part + (index * 137.508 + 20) / 30) % 12;
    return Math.round(255 * (0.55 - 0.38 * Math.max(-1, Math.min(hue - 3, 9 - hue, 1))));
  });
}

/** Values from 0 to `largest` as a line in the canvas's text colour. */
export function drawLine(canvas, values, largest) {
  const context = canvas.getContext("2d"), { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 2;
  context.beginPath();
  for (const [place, value] of values.entries())
    context.lineTo((place * width) / Math.max(values.length - 1, 1), height - 2 - (value / largest) * (height - 4));
  context.stroke();
}
