// Numbers in base64: .npy files, and little-endian float32 vectors.
const TYPES = { "<f4": Float32Array, "|u1": Uint8Array, "<u2": Uint16Array, "<i4": Int32Array };

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

/** Base64 of little-endian float32 to a Float32Array. */
export function readVector(base64) {
  return new Float32Array(bytesOf(base64).buffer);
}

/** Base64 of an .npy file, version 1, in C order: `{ shape, data }`. */
export function readNpy(base64) {
  const bytes = bytesOf(base64), start = 10 + bytes[8] + 256 * bytes[9];
  const header = new TextDecoder("latin1").decode(bytes.subarray(10, start));
  const [, type] = header.match(/'descr': '([^']+)'/), [, sizes] = header.match(/'shape': \(([^)]*)\)/);
  if (!(type in TYPES) || header.includes("'fortran_order': True")) throw new Error(`no array of ${type} in C order`);
  const shape = sizes.split(",").filter((size) => size.trim()).map(Number);
  return { shape, data: new TYPES[type](bytes.slice(start).buffer) };
}
