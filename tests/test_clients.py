"""The Python and the JavaScript client against real servers."""

import asyncio
import inspect
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from prometheus_client import CollectorRegistry

from models.tasks.table import get_task
from service.gateway.app import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.conftest import Running, running
from tests.test_architecture import ROOT
from vitrail_client import AsyncClient, Client, Image, VitrailError, calls
from vitrail_client.call import Call
from vitrail_client.protocol import MAX_WAIT_S, split, wait_before_retry

JAVASCRIPT = ROOT / "service/gateway/assets/vitrail.js"
# As a part of a URL's path, these would make it another one.
WRONG_IDS = ["..", ".", "a/../b", "a/.", "../../other"]
WRONG_NAMES = ["", ".", "..", "photos/images/left"]


@pytest.fixture(scope="module")
def server(clip: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("collections")
    with running(clip[0], collections=str(folder)) as started:
        started.wait_ready()
        yield started


@pytest.fixture
def busy() -> Iterator[tuple[str, list[str]]]:
    """A server that is busy for two requests, then answers; its URL and the requests' paths."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            status = {1: 429, 2: 503}.get(len(seen), 200)
            body = json.dumps({"models": [{"name": "late"}]} if status == 200 else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", seen
    made.shutdown()
    made.server_close()
    thread.join()


def use(client: Client, jpegs: dict[str, bytes], folder: Path) -> list[Any]:
    """What a program asks for, in one list."""
    (folder / "rocket.jpg").write_bytes(jpegs["rocket"])
    images: list[Image] = [jpegs["coffee"], folder / "rocket.jpg", b"no image", jpegs["chelsea"]]
    answers: list[Any] = [
        client.zero_shot(images[:3], ["a cat", "a dog"]),
        client.embed(images, dimensions=8, truncate=True),
        client.embed_texts(["a", "b", "c"], model="clip"),
        client.task("zero-shot", images[:1], labels=["a cat"], top_k=None),
        client.request("GET", "/models/clip")["name"],
        client.predict(images[:2], ["clip-named", "images"]),
        [model["name"] for model in client.models()],
        client.create_collection("things", model="clip")["images"],
        client.add_images(
            "things", images, ids=["coffee", "rocket", "none", "cat"], metadata=[{"n": 1}] * 4
        ),
        client.search("things", image=images[0], k=2, where={"n": 1}),
        client.search("things", text="a cat"),
        [collection["images"] for collection in client.collections()],
    ]
    client.delete_collection("things")
    answers[0][2]["error"].pop("request_id")
    return answers


class Waiting:
    """An AsyncClient whose methods wait, so that both clients can do the same."""

    def __init__(self, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **options: self._loop.run_until_complete(method(*args, **options))


def test_both_python_clients_batch_keep_the_order_and_agree(
    server: Running, jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "batch_size": 2, "concurrency": 2, "progress": lambda *counts: done.append(counts),
    }  # fmt: skip
    with Client(server.url, **options) as client:
        answers = use(client, jpegs, tmp_path)
    assert done[:4] == [(2, 3), (3, 3), (2, 4), (4, 4)]
    scored, embedded, texts, alone, name, predicted, models, empty, added, found, _, counts = (
        answers
    )
    assert [("error" in entry) for entry in scored] == [False, False, True]  # sent by itself
    assert scored[2]["error"]["status"] == 422
    assert len(embedded[0]["embedding"]) == 8
    assert len(texts) == 3
    assert alone[0]["predictions"][0]["label"] == "a cat"
    assert name == "clip"
    assert predicted[0]["outputs"].keys() == {"clip-named", "images"}
    assert "clip" in models
    assert empty == 0
    assert [entry.get("id") for entry in added] == ["coffee", "rocket", "none", "cat"]
    assert found[0]["id"] == "coffee"
    assert counts == [3]
    with asyncio.Runner() as runner:
        again = AsyncClient(server.url, **options)
        waiting: Any = Waiting(again, runner.get_loop())
        others = use(waiting, jpegs, tmp_path)
        runner.run(again.close())
    strip = json.JSONDecoder(parse_float=lambda text: round(float(text), 4)).decode
    assert strip(json.dumps(others)) == strip(json.dumps(answers))


def test_errors_carry_the_servers_words(server: Running, jpegs: dict[str, bytes]) -> None:
    async def embed() -> None:
        async with AsyncClient(server.url) as client:
            await client.embed([jpegs["coffee"]], model="none")

    with Client(server.url) as client:
        for ask in (
            lambda: client.embed([jpegs["coffee"]], model="none"),
            lambda: asyncio.run(embed()),
        ):
            with pytest.raises(VitrailError, match="no model 'none'") as info:
                ask()
            assert info.value.status == 404
            assert info.value.problem["request_id"]


def test_what_is_wrong_with_every_image_fails_the_call(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    """Also if each image is sent by itself."""
    images: list[Image] = [jpegs["coffee"], jpegs["rocket"], b"no image"]
    with Client(server.url, batch_size=1) as client:
        assert ["error" in entry for entry in client.embed(images)] == [False, False, True]
        assert all("error" in entry for entry in client.embed([b"no image", b"none either"]))
        client.create_collection("small", model="clip")
        wrong = {images[0]: b"<svg/>"}
        added = client.add_images("small", images[:2], thumbnail=wrong.get)
        assert ["error" in entry for entry in added] == [True, False]
        client.delete_collection("small")
        asks: dict[str, Callable[[], Any]] = {
            "top_k": lambda: client.classify(images, top_k=-5),
            "model": lambda: client.segment(images, model="clip"),
            "image": lambda: client.embed(images, model="texts"),
        }
        for field, ask in asks.items():
            with pytest.raises(VitrailError) as info:
                ask()
            assert info.value.status == 422
            assert [error["field"] for error in info.value.problem["errors"]] == [field]


def test_ids_that_a_url_would_lose_are_refused(server: Running, jpegs: dict[str, bytes]) -> None:
    with Client(server.url) as client:
        client.create_collection("photos", model="clip")
        ids = ["/in/a folder/1.jpg", "..a/b./...", "left"]
        client.add_images("photos", [jpegs["coffee"]] * 3, ids=ids)
        for image in WRONG_IDS:
            with pytest.raises(ValueError, match="which URLs lose"):
                client.delete_image("photos", image)
        for name in WRONG_NAMES:
            with pytest.raises(ValueError, match="cannot be a collection's name"):
                client.delete_collection(name)
        for image in ids[:2]:
            client.delete_image("photos", image)
        assert [image["id"] for image in client.images("photos")["images"]] == ["left"]
        client.delete_collection("photos")


def test_large_images_are_sent_in_smaller_batches() -> None:
    sizes = [9, 9, 9, 30, 40, 1, 1]
    batches = split([size * 2**20 for size in sizes], 3, lambda size: size)
    assert [[size // 2**20 for size in batch] for batch in batches] == [
        [9, 9, 9], [30], [40], [1, 1],
    ]  # fmt: skip
    assert [len(batch) for batch in split(range(7), 3, lambda _: 0)] == [3, 3, 1]
    assert split([], 3, lambda _: 0) == []


def test_a_busy_server_is_asked_again(busy: tuple[str, list[str]]) -> None:
    url, seen = busy
    with Client(url) as client:
        assert client.models() == [{"name": "late"}]
    assert len(seen) == 3


def test_one_that_stays_busy_is_reported(busy: tuple[str, list[str]]) -> None:
    url, seen = busy
    with Client(url, max_tries=2) as client, pytest.raises(VitrailError, match="503"):
        client.models()
    assert len(seen) == 2


def test_waiting_honours_retry_after() -> None:
    def wait(header: str | None) -> float:
        headers = {} if header is None else {"Retry-After": header}
        return wait_before_retry(1, httpx.Response(429, headers=headers))

    assert wait("7") == 7
    assert wait("100000") == MAX_WAIT_S
    assert wait(None) == wait("soon") == wait_before_retry(1, None) == 1
    assert wait(formatdate(0)) == 0


# A call of each method with every parameter; the same in JavaScript below.
OPTIONS: dict[str, Any] = {
    "classify": {"model": "m", "top_k": 3},
    "zero_shot": {"labels": ["a"], "model": "m", "templates": ["{}"], "multi_label": True},
    "embed": {
        "model": "m", "pooling": "cls", "normalize": True, "dimensions": 8, "truncate": True,
    },
    "segment": {
        "model": "m", "output": "png", "threshold": 0.5, "min_area": 1, "labels": ["a"],
        "templates": ["{}"],
    },
}  # fmt: skip
CALLS: dict[str, Call[Any]] = {
    **{name: getattr(calls, name)([b"x"], **options) for name, options in OPTIONS.items()},
    "embed_texts": calls.embed_texts(["a"], model="m", dimensions=8),
    "predict": calls.predict([b"x"], ["m"]),
    "task": calls.task("depth", [b"x"], model="m"),
    "models": calls.models(),
    "create_collection": calls.create_collection("c", model="m"),
    "collections": calls.collections(),
    "collection": calls.collection("c"),
    "delete_collection": calls.delete_collection("c"),
    "images": calls.images("c", after="a", limit=3),
    "add_images": calls.add_images(
        "c", [b"x"], ids=["a/b?"], metadata=[{"n": 1}], thumbnail=lambda _: b"x"
    ),
    "add_folder": calls.add_folder("c", "/photos", after="/photos/a.jpg", thumbnails=False),
    "delete_image": calls.delete_image("c", "a/b?"),
    "delete_images": calls.delete_images("c", ["a/b?", ".."]),
    "search": calls.search(
        "c", image=b"x", text="a", vector=[1.0], k=3, where={"n": 1}, thumbnails=True
    ),
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    backend: Any = None  # the document does not depend on it
    app = create_app(Settings(), backend, Metrics(CollectorRegistry()))
    found: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return found


def check_request(
    document: dict[str, Any], method: str, path: str, query: Any, content: Any, form: Any
) -> None:
    """The document has the operation, and takes these parameters and this body."""
    templates = [
        template
        for template in document["paths"]
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template.replace("{image}", "a/b%3F")), path)
    ]
    [template] = templates
    operation = document["paths"][template][method.lower()]
    named = {each["name"] for each in operation.get("parameters", []) if each["in"] == "query"}
    assert set(query) <= named
    for media_type, sent in (("application/json", content), ("multipart/form-data", form)):
        if sent is not None:
            schema = operation["requestBody"]["content"][media_type]["schema"]
            assert set(sent) <= schema["properties"].keys(), path
            if sent is content:
                jsonschema.validate(sent, schema)


@pytest.mark.parametrize("name", CALLS)
def test_python_requests_are_those_of_the_document(document: dict[str, Any], name: str) -> None:
    call = CALLS[name]
    [batch] = call.batches(16)
    sent = call.body(batch)
    assert sent.keys() <= {"json", "params"}
    query, content = sent.get("params", {}), sent.get("json")
    check_request(document, call.method, call.path, query, content, None)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_methods_have_the_options_of_the_tasks(name: str) -> None:
    """What they lack is rendered otherwise, belongs to one model, or is not for programs."""
    left_out = {"timing", "texts", "encoding", "gsd", "output", "layers", "prefix"}
    options = get_task(name.replace("_", "-")).options.model_fields.keys() | {"model"}
    signature = inspect.signature(getattr(Client, name))
    assert list(signature.parameters)[:2] == ["self", "images"]
    assert options - left_out <= signature.parameters.keys()
    assert signature.parameters.keys() - {"self", "images"} == OPTIONS[name].keys()


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, Any]:
        own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {name: inspect.signature(value) for name, value in own.items()}

    assert methods(Client) == methods(AsyncClient)
    assert methods(Client).keys() == CALLS.keys() | {"request", "close"}


SCRIPT = """
import { Vitrail, VitrailError } from "%(module)s";
import { readFileSync } from "node:fs";
const images = %(files)s.map((file) => new Blob([readFileSync(file)]));
const done = [];
const progress = (...counts) => done.push(counts);
const client = new Vitrail("%(url)s", { batchSize: 2, concurrency: 2, progress });
const items = images.map((image, n) => ({ image, id: `${n}`, metadata: { n } }));
const answers = {
  scored: await client.zeroShot(images.slice(0, 3), ["a cat", "a dog"]),
  embedded: await client.embed(images, { dimensions: 8, truncate: true }),
  texts: await client.embedTexts(["a", "b", "c"], { model: "clip" }),
  predicted: await client.predict(images.slice(0, 2), ["clip-named", "images"]),
  created: await client.createCollection("js", { model: "clip" }),
  added: await client.addImages("js", items),
  found: await client.search("js", { image: images[1], k: 1 }),
  filtered: await client.search("js", { text: "a cat", filter: { n: 3 } }),
  collections: await client.collections(),
  deleted: await client.deleteCollection("js"),
  done,
};
try {
  await client.embed(images, { model: "none" });
} catch (error) {
  answers.error = [error instanceof VitrailError, error.status, error.message];
}
answers.late = await new Vitrail("%(busy)s").models();
console.log(JSON.stringify(answers));
"""


CAREFUL = """
import { Vitrail, VitrailError } from "%(module)s";
import { readFileSync } from "node:fs";
const good = new Blob([readFileSync("%(file)s")]), bad = new Blob(["no image"]);
const client = new Vitrail("%(url)s", { batchSize: 1 });
const failure = (promise) => promise.then((value) => value, (error) =>
  error instanceof VitrailError ? error.problem.errors.map(({ field }) => field) : error.message);
await client.createCollection("photos", { model: "clip" });
const ids = ["/in/a folder/1.jpg", "..a/b./...", "left"];
await client.addImages("photos", ids.map((id) => ({ image: good, id })));
const answers = { listed: [], refused: [], failed: [] };
for (let page, after; after !== null; after = page.next) {
  page = await client.images("photos", { after, limit: 2 });
  answers.listed.push(...page.images.map(({ id }) => id));
}
for (const id of %(ids)s) answers.refused.push(await failure(client.deleteImage("photos", id)));
for (const name of %(names)s) answers.refused.push(await failure(client.deleteCollection(name)));
for (const id of ids.slice(0, 2)) await client.deleteImage("photos", id);
answers.left = (await client.images("photos")).images.map(({ id }) => id);
let running = 0, most = 0;
const thumbnail = async (image) => {
  most = Math.max(most, ++running);
  await new Promise((resolve) => setTimeout(resolve, 5));
  running--;
  return image === wrong ? new Blob(["<svg/>"]) : null;
};
const wrong = new Blob([good]);
const items = [{ image: wrong }, { image: good }];
answers.small = await client.addImages("photos", items, { thumbnail });
most = 0;
const one = new Vitrail("%(url)s");
await one.addImages("photos", ids.map((id) => ({ image: good, id })), { thumbnail });
answers.most = most;
await client.deleteCollection("photos");
answers.entries = [await client.embed([good, bad]), await client.embed([bad, bad])];
answers.failed.push(await failure(client.classify([good, bad], { top_k: -5 })));
answers.failed.push(await failure(client.segment([good, bad], { model: "clip" })));
answers.failed.push(await failure(client.embed([good, bad], { model: "texts" })));
console.log(JSON.stringify(answers));
"""


RECORDING = """
import { Vitrail } from "%(module)s";
const image = new Blob(["x"]), sent = {};
let name;
globalThis.fetch = async (url, { method, body }) => {
  const { pathname, searchParams } = new URL(url);
  const form = body instanceof FormData ? [...new Set(body.keys())] : null;
  const content = form || !body ? null : JSON.parse(body);
  sent[name] = [method, pathname, [...searchParams.keys()], content, form];
  return new Response("{}");
};
const client = new Vitrail("http://server", { maxTries: 1 });
const made = {
  classify: [[image], { model: "m", top_k: 3 }],
  zeroShot: [[image], ["a"], { model: "m", templates: ["{}"], multi_label: true }],
  embed: [[image], { model: "m", pooling: "cls", normalize: true, dimensions: 8, truncate: true }],
  embedTexts: [["a"], { model: "m", dimensions: 8 }],
  segment: [[image], { model: "m", output: "png", threshold: 0.5, min_area: 1, labels: ["a"] }],
  predict: [[image], ["m"]],
  task: ["depth", [image], { model: "m" }],
  models: [],
  createCollection: ["c", { model: "m" }],
  collections: [],
  collection: ["c"],
  deleteCollection: ["c"],
  images: ["c", { after: "a", limit: 3 }],
  addImages: ["c", [{ image, id: "a/b?", metadata: { n: 1 } }], { thumbnail: () => image }],
  addFolder: ["c", "/photos", { after: "/photos/a.jpg" }],
  deleteImage: ["c", "a/b?"],
  deleteImages: ["c", ["a/b?", ".."]],
  search: ["c", { image, text: "a", vector: [1], k: 3, filter: { n: 1 }, thumbnails: true }],
};
for (name of Object.getOwnPropertyNames(Vitrail.prototype))
  if (name !== "constructor" && name !== "send") await client[name](...made[name]);
console.log(JSON.stringify(sent));
"""


PATIENT = """
import { createServer } from "node:http";
import { Vitrail } from "%(module)s";
const server = createServer((request, response) => {
  if (request.url === "/models") response.end('{"models": ["late"]}'); // others wait for ever
});
const listen = (port) => new Promise((done) => server.listen(port, "127.0.0.1", done));
await listen(0);
const { port } = server.address(), sent = fetch;
await new Promise((done) => server.close(done));
let tries = 0;
globalThis.fetch = async (...given) => {
  if (++tries === 2) await listen(port);
  return sent(...given);
};
const url = `http://127.0.0.1:${port}`, failure = (promise) => promise.catch((error) => error);
const refused = await failure(new Vitrail(url, { maxTries: 1 }).models());
tries = 0;
const late = await new Vitrail(url).models();
const slow = await failure(new Vitrail(url, { timeoutS: 0.1 }).collections());
server.closeAllConnections();
server.close();
console.log(JSON.stringify({ refused: refused.cause.code, late, slow: slow.name, tries }));
"""


def node(script: str, folder: Path, **places: str) -> Any:
    """What a script prints as JSON that imports our module."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed (apt-get install nodejs)")
    module = folder / "vitrail.mjs"
    module.write_text(JAVASCRIPT.read_text())
    (folder / "script.mjs").write_text(script % {"module": module, **places})
    command = [program, str(folder / "script.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_javascript_requests_are_those_of_the_document(
    document: dict[str, Any], tmp_path: Path
) -> None:
    sent = node(RECORDING, tmp_path)
    assert {re.sub("[A-Z]", lambda m: f"_{m[0].lower()}", name) for name in sent} == CALLS.keys()
    for request in sent.values():
        check_request(document, *request)


def test_the_javascript_client_waits_for_a_server_that_starts_but_not_for_ever(
    tmp_path: Path,
) -> None:
    answers = node(PATIENT, tmp_path)
    assert answers["refused"] == "ECONNREFUSED"
    assert answers["late"] == ["late"]
    assert answers["slow"] == "TimeoutError"
    assert answers["tries"] == 3  # one of them was refused


def test_the_javascript_client(
    server: Running, busy: tuple[str, list[str]], jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    files = [tmp_path / f"{name}.jpg" for name in ("coffee", "rocket", "none", "chelsea")]
    for path in files:
        path.write_bytes(jpegs.get(path.stem, b"no image"))
    named = json.dumps([str(path) for path in files])
    answers = node(SCRIPT, tmp_path, url=server.url, busy=busy[0], files=named)
    assert ["error" in entry for entry in answers["scored"]] == [False, False, True]
    assert len(answers["embedded"][0]["embedding"]) == 8
    assert len(answers["texts"]) == 3
    assert answers["predicted"][0]["outputs"].keys() == {"clip-named", "images"}
    assert answers["created"]["dimensions"] == 48
    assert [entry.get("id") for entry in answers["added"]] == ["0", "1", "2", "3"]
    assert "error" in answers["added"][2]
    assert answers["found"][0]["id"] == "1"
    assert [hit["id"] for hit in answers["filtered"]] == ["3"]
    assert [found["images"] for found in answers["collections"]] == [3]
    assert answers["deleted"] is None
    assert answers["done"][0] in ([2, 3], [1, 3])  # either batch may be the first
    assert answers["done"][1:4] == [[3, 3], [2, 4], [4, 4]]
    assert answers["error"][:2] == [True, 404]
    assert "no model 'none'" in answers["error"][2]
    assert answers["late"] == [{"name": "late"}]
    assert len(busy[1]) == 3


def test_the_javascript_client_is_as_careful(
    server: Running, jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    """Ids that a URL would lose, pages until there are no more, and errors of every image."""
    (tmp_path / "coffee.jpg").write_bytes(jpegs["coffee"])
    wrong = {"ids": json.dumps(WRONG_IDS), "names": json.dumps(WRONG_NAMES)}
    file = str(tmp_path / "coffee.jpg")
    answers = node(CAREFUL, tmp_path, url=server.url, file=file, **wrong)
    assert sorted(answers["listed"]) == ["..a/b./...", "/in/a folder/1.jpg", "left"]
    messages = ["which URLs lose"] * len(WRONG_IDS) + ["collection's name"] * len(WRONG_NAMES)
    for text, message in zip(answers["refused"], messages, strict=True):
        assert message in text
    assert answers["left"] == ["left"]
    assert ["error" in entry for entry in answers["small"]] == [True, False]
    assert answers["most"] == 1  # of a batch's photos one at a time is decoded
    shown = [["error" in entry for entry in entries] for entries in answers["entries"]]
    assert shown == [[False, True], [True, True]]
    assert answers["failed"] == [["top_k"], ["model"], ["image"]]
