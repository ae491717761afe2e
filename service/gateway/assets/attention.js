// Attention maps of each head, and of their mean.
import { drawHeat, photoCanvas, scaled } from "./canvas.js";
import { readNpy } from "./npy.js";
import { make } from "./shared.js";

const WIDTH = 480;

export function drawAttention({ width, height, grid, region, attention }, photo, parent) {
  const { shape: [heads], data } = readNpy(attention);
  const cells = grid[0] * grid[1];
  const maps = Array.from({ length: heads }, (_, head) => data.subarray(head * cells, (head + 1) * cells));
  const mean = Float32Array.from({ length: cells }, (_, cell) => maps.reduce((sum, map) => sum + map[cell], 0) / heads);
  const list = make("div", "", parent, { className: "heads" });
  for (const [name, values] of [["mean of all heads", mean], ...maps.map((map, head) => [`head ${head}`, map])]) {
    const button = make("button", "", list, { type: "button", ariaPressed: "false" });
    const { context } = photoCanvas(photo, width, height, WIDTH, button);
    drawHeat(context, scaled(values), grid, region);
    make("span", name, button);
    // the pressed one is shown large
    button.addEventListener("click", () => {
      const pressed = button.ariaPressed !== "true";
      for (const other of list.children) other.ariaPressed = String(other === button && pressed);
    });
  }
}
