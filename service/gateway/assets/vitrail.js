/**
 * A client of Vitrail's REST interface, for browsers and Node 18 or newer.
 *
 *     import { Vitrail } from "http://localhost:8000/assets/vitrail.js";
 *     const [entry] = await new Vitrail("http://localhost:8000").classify([file], { top_k: 3 });
 *
 * Images are Blobs (or Files), ArrayBuffers or Uint8Arrays. Lists of results have one entry for each
 * image, in order. An image that failed has `{ error }` in its place; if it was the only one, the
 * method throws a VitrailError.
 */

const RETRY_STATUSES = [429, 503];
// Node's words for a server that got nothing of the request; browsers say none.
const UNREACHED_CODES = ["ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ENOTFOUND", "EAI_AGAIN",
  "UND_ERR_CONNECT_TIMEOUT"];
const FIRST_WAIT_MS = 500, MAX_WAIT_MS = 30_000;
// Bytes of the images of one request; they may be a third more in JSON. Servers take 64 MiB.
const MAX_BATCH_BYTES = 32 * 2 ** 20;
// The statuses of an image that is wrong or too large.
const INPUT_STATUSES = [413, 422];
// The fields by which a server names an item itself; what is wrong with others is wrong with all.
const ITEM_FIELDS = ["image", "images", "pixel_values", "text", "texts", "id", "metadata", "thumbnail"];

/** An answer with an error: `status` and the members of `application/problem+json` in `problem`. */
export class VitrailError extends Error {
  /** @param {number} status @param {Record<string, any>} problem */
  constructor(status, problem) {
    super(`${status} ${problem.title ?? ""}: ${problem.detail ?? ""}`);
    this.name = "VitrailError";
    this.status = status;
    this.problem = problem;
  }
}

export class Vitrail {
  /**
   * @param {string} url the server; empty for the one that a page came from
   * @param {{ key?: string, batchSize?: number, concurrency?: number, maxTries?: number,
   *           timeoutS?: number, progress?: (done: number, all: number) => void }} [options]
   *   `timeoutS` is for each request with its answer; none by default
   */
  constructor(url = "", { key = "", batchSize = 16, concurrency = 4, maxTries = 5, timeoutS, progress } = {}) {
    this.url = url.replace(/\/$/, "");
    this.key = key;
    this.batchSize = batchSize;
    this.concurrency = concurrency;
    this.maxTries = maxTries;
    this.timeoutS = timeoutS;
    this.progress = progress;
  }

  /** `{ predictions: [{ index, label, score }] }` for each image, best first. */
  classify(images, options = {}) {
    return this.task("classify", images, options);
  }

  /** As `classify`, with labels of one's own. */
  zeroShot(images, labels, options = {}) {
    return this.task("zero-shot", images, { labels, ...options });
  }

  /** `{ embedding }` for each image. */
  embed(images, options = {}) {
    return this.task("embed", images, options);
  }

  /** `{ embedding }` for each text, of a model that embeds texts, too. */
  embedTexts(texts, options = {}) {
    return this.#all("/embed", texts, (batch) => json({ texts: batch, ...options }));
  }

  /** `{ width, height, classes, mask }` for each image. */
  segment(images, options = {}) {
    return this.task("segment", images, options);
  }

  /** `{ outputs: { model: ... } }` for each image. */
  predict(images, models) {
    return this.task("predict", images, { models });
  }

  /** Any task by its name, with its options. */
  task(name, images, options = {}) {
    return this.#all(`/${name}`, images, (batch) => ({ body: form(batch, options) }));
  }

  /** Every model of the catalog, with its state. */
  async models() {
    return (await this.send("GET", "/models")).models;
  }

  /** Create a collection, unless it exists with that model. */
  async createCollection(name, options = {}) {
    return this.send("PUT", collectionPath(name), json(options));
  }

  /** Every collection, with its model and number of images. */
  async collections() {
    return (await this.send("GET", "/collections")).collections;
  }

  /** One collection, with its model and number of images. */
  async collection(name) {
    return this.send("GET", collectionPath(name));
  }

  /** Delete a collection with all its images. */
  async deleteCollection(name) {
    return this.send("DELETE", collectionPath(name));
  }

  /**
   * Add images to a collection: `{ id }` or `{ error }` for each.
   * @param {string} collection
   * @param {{ image: Blob | ArrayBuffer | Uint8Array, id?: string, metadata?: object }[]} items
   * @param {{ thumbnail?: (image: Blob | ArrayBuffer | Uint8Array) => Promise<Blob | null> }} [options]
   *   `thumbnail` makes a small JPEG, PNG or WebP of an image when that is sent; searches return it
   */
  async addImages(collection, items, { thumbnail = () => null } = {}) {
    return this.#all(`${collectionPath(collection)}/images`, items, async (batch) => {
      const images = [];
      for (const { image, ...others } of batch) { // one after another: a decoded photo is large
        const small = await thumbnail(image);
        images.push({ base64: await base64(image), ...(small && { thumbnail: await base64(small) }), ...others });
      }
      return json({ images });
    });
  }

  /**
   * Add the next new or changed images of a folder of the server, if it allows that:
   * `{ results, next }`. The other files come with `{ after: next }`, until that is null. The server
   * makes thumbnails of them, unless `{ thumbnails: false }`.
   */
  async addFolder(collection, folder, options = {}) {
    return this.send("POST", `${collectionPath(collection)}/images`,
      json({ folder, ...options }));
  }

  /**
   * The images of a collection by id, at most 1000: `{ images: [{ id, metadata }], next }`. The
   * other ones come with `{ after: next }`, until that is null.
   */
  async images(collection, options = {}) {
    const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value != null));
    return this.send("GET", `${collectionPath(collection)}/images?${query}`);
  }

  /** Delete an image from a collection by its id. */
  async deleteImage(collection, id) {
    const parts = id.split("/");
    if (parts.includes(".") || parts.includes(".."))
      throw new Error(`the id ${JSON.stringify(id)} has a part . or .., which URLs lose`);
    const path = parts.map(encodeURIComponent).join("/");
    return this.send("DELETE", `${collectionPath(collection)}/images/${path}`);
  }

  /** Delete up to 1000 images from a collection by their ids; how many of them were there. */
  async deleteImages(collection, ids) {
    return (await this.send("POST", `${collectionPath(collection)}/images/delete`, json({ ids }))).deleted;
  }

  /**
   * The images nearest to `image`, `text` or `vector`, best first: `{ id, score, metadata }` each,
   * and with `thumbnails` base64 text in `thumbnail`, or null.
   * @param {string} collection
   * @param {{ image?: Blob, text?: string, vector?: number[], k?: number, filter?: object,
   *           thumbnails?: boolean }} query
   */
  async search(collection, { image, ...query }) {
    if (image) query.image = { base64: await base64(image) };
    return (await this.send("POST", `${collectionPath(collection)}/search`, json(query))).hits;
  }

  /** Send a request, again while the server is busy or, in Node, unreachable; its JSON, or null without any. */
  async send(method, path, { body, headers = {} } = {}) {
    if (this.key) headers = { ...headers, Authorization: `Bearer ${this.key}` };
    for (let attempt = 0; ; attempt++) {
      const isLast = attempt >= this.maxTries - 1;
      const signal = this.timeoutS ? AbortSignal.timeout(1000 * this.timeoutS) : undefined;
      let response;
      try {
        response = await fetch(this.url + path, { method, body, headers, signal });
      } catch (error) {
        if (isLast || !UNREACHED_CODES.includes(error.cause?.code)) throw error;
        await pause(waitBeforeRetry(attempt, null));
        continue;
      }
      if (RETRY_STATUSES.includes(response.status) && !isLast) {
        await response.arrayBuffer();
        await pause(waitBeforeRetry(attempt, response.headers.get("Retry-After")));
        continue;
      }
      const text = await response.text();
      if (response.ok) return text ? JSON.parse(text) : null;
      throw new VitrailError(response.status, parseProblem(response, text));
    }
  }

  /** The entries of all items, which are sent in batches, several at a time. */
  async #all(path, items, make) {
    const batches = split(items, this.batchSize);
    const results = new Array(batches.length);
    let next = 0, done = 0;
    const work = async () => {
      while (next < batches.length) {
        const place = next++;
        const request = await make(batches[place]);
        const alone = batches[place].length === 1 && items.length > 1;
        try {
          results[place] = (await this.send("POST", path, request)).results;
        } catch (error) {  // a server refuses a request whose only image is wrong
          if (!alone || !INPUT_STATUSES.includes(error.status) || !isOfItem(error.problem)) throw error;
          results[place] = [{ error: error.problem }];
        }
        done += batches[place].length;
        this.progress?.(done, items.length);
      }
    };
    await Promise.all(Array.from({ length: Math.min(this.concurrency, batches.length) }, work));
    const entries = results.flat();
    throwIfAllFailed(entries);
    return entries;
  }
}

/** The path of a collection; throws if none can have that name, and it would be another route's. */
function collectionPath(name) {
  const part = encodeURIComponent(name);
  if (["", ".", ".."].includes(part) || part.includes("%2F"))
    throw new Error(`${JSON.stringify(name)} cannot be a collection's name`);
  return `/collections/${part}`;
}

/** Whether a problem names no other field than the item's own. */
function isOfItem(problem) {
  return (problem.errors ?? []).every(({ field }) => ITEM_FIELDS.includes(field.split(".")[0]));
}

/** Fail the call if every item came alone and was refused for the same field. */
function throwIfAllFailed(entries) {
  const problems = entries.map((entry) => entry?.error);
  const fields = problems.map((problem) => JSON.stringify(problem?.errors ?? []));
  if (fields.length && fields[0] !== "[]" && fields.every((each) => each === fields[0]))
    throw new VitrailError(problems[0].status, problems[0]);
}

/** Batches of at most `count` items that have MAX_BATCH_BYTES together, or of one larger item. */
function split(items, count) {
  const batches = [];
  let total = 0;
  for (const item of items) {
    const image = item.image ?? item;
    const size = image.size ?? image.byteLength ?? image.length;
    const last = batches.at(-1);
    total += size;
    if (last && last.length < count && total <= MAX_BATCH_BYTES) last.push(item);
    else batches.push([item]), total = size;
  }
  return batches;
}

function json(value) {
  return { body: JSON.stringify(value), headers: { "Content-Type": "application/json" } };
}

function form(images, options) {
  const body = new FormData();
  for (const image of images)
    body.append("image", image instanceof Blob ? image : new Blob([image]), image.name ?? "image");
  for (const [name, value] of Object.entries(options))
    for (const item of Array.isArray(value) ? value : [value])
      if (item !== undefined && item !== null) body.append(name, String(item));
  return body;
}

async function base64(image) {
  const bytes = new Uint8Array(image instanceof Blob ? await image.arrayBuffer() : image);
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768)
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  return btoa(text);
}

/** Milliseconds until a request may be sent again; `Retry-After` is in seconds or a date. */
function waitBeforeRetry(attempt, header) {
  const wait = header === null ? FIRST_WAIT_MS * 2 ** attempt
    : /^[\d.]+$/.test(header) ? 1000 * Number(header)
    : Date.parse(header) - Date.now();
  return Math.min(Math.max(wait || 0, 0), MAX_WAIT_MS);
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function parseProblem(response, text) {
  try {
    return JSON.parse(text);
  } catch {
    return { title: response.statusText, detail: text.slice(0, 500) };
  }
}
