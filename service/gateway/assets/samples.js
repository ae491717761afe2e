// Photos that come with the page; samples/README.md says whose they are.
import { decode } from "./canvas.js";
import { make, picture } from "./shared.js";

export const SAMPLES = ["cat", "coffee", "astronaut", "rocket", "raccoon", "coins", "galaxies", "photographer"];
export const TEXTURES = ["brick", "grass", "gravel"]; // to be cut into pieces
const SIDE = 3; // pieces in a row and in a column

export const address = (name) => `assets/samples/${name}.jpg`;

/** A sample as a file. */
export async function sampleFile(name) {
  const content = await (await fetch(address(name))).blob();
  return new File([content], `${name}.jpg`, { type: "image/jpeg" });
}

/** A row of thumbnails; `take` gets the file of the one that is clicked. */
export function showSamples(parent, take, names = SAMPLES) {
  for (const name of names) {
    const button = make("button", "", parent, { type: "button", className: "photo", title: name });
    picture(address(name), `Sample: ${name}`, button).draggable = false;
    button.addEventListener("click", async () => take([await sampleFile(name)]));
  }
}

/** The pieces of a texture as files, row by row. */
export async function pieces(name) {
  const photo = await decode(await sampleFile(name));
  const width = Math.floor(photo.width / SIDE), height = Math.floor(photo.height / SIDE);
  return Promise.all(Array.from({ length: SIDE * SIDE }, async (_, place) => {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(photo, -width * (place % SIDE), -height * Math.floor(place / SIDE));
    return fileOf(canvas, `${name}-${place + 1}.jpg`);
  }));
}

/** What a canvas shows as a JPEG file. */
export async function fileOf(canvas, name) {
  const content = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
  return new File([content], name, { type: "image/jpeg" });
}
