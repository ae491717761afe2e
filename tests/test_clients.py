"""The Python and the JavaScript client against real servers."""

import asyncio
import inspect
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.tasks.table import get_task
from tests.conftest import Running, running
from tests.test_architecture import ROOT
from vitrail_client import AsyncClient, Client, Image, VitrailError
from vitrail_client.protocol import MAX_WAIT_S, wait_before_retry

JAVASCRIPT = ROOT / "service/gateway/assets/vitrail.js"


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
        client.zero_shot(images, ["a cat", "a dog"]),
        client.embed(images, dimensions=8, truncate=True),
        client.embed_texts(["a", "b", "c"], model="clip"),
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
    assert done[:2] == [(2, 4), (4, 4)]
    scored, embedded, texts, predicted, models, empty, added, found, _, counts = answers
    assert [("error" in entry) for entry in scored] == [False, False, True, False]
    assert scored[2]["error"]["status"] == 422
    assert len(embedded[0]["embedding"]) == 8
    assert len(texts) == 3
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
    with Client(server.url) as client, pytest.raises(VitrailError, match="no model 'none'") as info:
        client.embed([jpegs["coffee"]], model="none")
    assert info.value.status == 404
    assert info.value.problem["request_id"]


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
    assert wait(None) == wait_before_retry(1, None) == 1
    assert wait(formatdate(0)) == 0


@pytest.mark.parametrize("task", ["classify", "zero-shot", "embed", "segment"])
def test_the_methods_have_the_parameters_of_the_routes(server: Running, task: str) -> None:
    """What both lack is rendered otherwise, belongs to one model, or is not for programs."""
    left_out = {"timing", "texts", "encoding", "gsd"}
    document = server.client.get("/openapi.json").json()
    described = document["paths"][f"/{task}"]["post"]["parameters"]
    names = {parameter["name"] for parameter in described} - left_out
    for kind in (Client, AsyncClient):
        method = inspect.signature(getattr(kind, task.replace("-", "_")))
        taken = method.parameters.keys() - {"self", "images"}
        assert taken <= names
        assert names & (get_task(task).options.model_fields.keys() - left_out) <= taken | NEWER


# Options that the clients do not name yet; `_task` would send them.
NEWER = {"output", "layers", "prefix", "truncate"}

SCRIPT = """
import { Vitrail, VitrailError } from "%(module)s";
import { readFileSync } from "node:fs";
const images = %(files)s.map((file) => new Blob([readFileSync(file)]));
const done = [];
const progress = (...counts) => done.push(counts);
const client = new Vitrail("%(url)s", { batchSize: 2, concurrency: 2, progress });
const items = images.map((image, n) => ({ image, id: `${n}`, metadata: { n } }));
const answers = {
  scored: await client.zeroShot(images, ["a cat", "a dog"]),
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


def test_the_javascript_client(
    server: Running, busy: tuple[str, list[str]], jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed (apt-get install nodejs)")
    files = [tmp_path / f"{name}.jpg" for name in ("coffee", "rocket", "none", "chelsea")]
    for path in files:
        path.write_bytes(jpegs.get(path.stem, b"no image"))
    module = tmp_path / "vitrail.mjs"
    module.write_text(JAVASCRIPT.read_text())
    places = {"url": server.url, "busy": busy[0], "module": module}
    script = tmp_path / "script.mjs"
    script.write_text(SCRIPT % (places | {"files": json.dumps([str(path) for path in files])}))
    done = subprocess.run([node, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert ["error" in entry for entry in answers["scored"]] == [False, False, True, False]
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
    assert answers["done"][:2] == [[2, 4], [4, 4]]
    assert answers["error"][:2] == [True, 404]
    assert "no model 'none'" in answers["error"][2]
    assert answers["late"] == [{"name": "late"}]
    assert len(busy[1]) == 3
