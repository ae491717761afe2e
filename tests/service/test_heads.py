"""Heads over REST and gRPC: uploaded, fitted, deleted, under traffic and after crashes."""

import base64
import errno
import io
import json
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from safetensors.torch import load_file

from models import Registry
from models.checkpoints.checkpoint import HeadState
from models.checkpoints.store import Store
from models.heads.files import HeadFile, decode_head, encode_head, read_head
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.worker.collector import SharedGauges
from tests.conftest import Running, answers, encode, free_port, process, running, wait_until
from tests.models.test_fixtures import GOLDENS

WAYS = ["in one process", "gateway and worker apart"]


@pytest.fixture(scope="module", params=WAYS)
def started(
    tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Running]:
    folder = str(tmp_path_factory.mktemp("heads"))
    apart = "apart" in request.param
    with running(tiny_catalog, apart=apart, heads_folder=folder, admin_keys="admin") as server:
        server.wait_ready()
        server.client.headers["Authorization"] = "Bearer admin"
        yield server


@pytest.fixture
def server(started: Running) -> Iterator[Running]:
    """A server without heads: what a test leaves is removed."""
    yield started

    def emptied() -> bool:
        heads = started.client.get("/heads").json()["heads"]
        for head in heads:
            started.client.delete(f"/heads/{head['name']}")
        return not heads

    wait_until(emptied)


def heads_folder(server: Running) -> Path:
    return server.backend.heads._folder.root


@pytest.fixture(scope="module")
def make(tiny_catalog: Path) -> Callable[..., HeadFile]:
    """Random VQT heads for the tiny catalog's ViT."""
    registry = Registry.from_catalog(
        tiny_catalog, device="cpu", store=Store(tiny_catalog.parent / "store")
    )
    trunk = registry.load_trunk("tiny").trunk
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features

    def made(seed: int = 0, **changed: Any) -> HeadFile:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(3, dim * (1 + depth), generator=generator)
        head = HeadFile(
            kind="vqt",
            trunk="tiny",
            trunk_digest=trunk.digest,
            preprocess_digest=trunk.preprocess.digest,
            labels=("cat", "dog", "cow"),
            state=HeadState(
                {
                    "queries": torch.randn(depth, 1, dim, generator=generator),
                    "classifier.0.weight": weight,
                    "classifier.0.bias": torch.zeros(3),
                }
            ),
        )
        return replace(head, **changed)

    return made


def upload(server: Running, name: str, head: HeadFile | bytes, **fields: str) -> httpx.Response:
    content = head if isinstance(head, bytes) else encode_head(head)
    return server.client.post("/heads", files={"file": content}, data={"name": name, **fields})


def classify(server: Running, model: str, image: bytes) -> httpx.Response:
    return server.client.post("/classify", params={"model": model}, content=image)


def tinted(label: str, seed: int) -> bytes:
    """Noise with more of one colour."""
    noise = np.random.default_rng(seed + ord(label[0])).integers(0, 160, (48, 48, 3))
    noise[:, :, ("red", "green", "blue").index(label)] += 90
    return encode(Image.fromarray(noise.astype(np.uint8)), "PNG")


def tinted_zip(count: int = 6, extra: Mapping[str, bytes] | None = None) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for label in ("red", "blue"):
            for i in range(count):
                archive.writestr(f"{label}/{i}.png", tinted(label, i))
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return content.getvalue()


def begin_fit(server: Running, name: str, archive: bytes, **fields: Any) -> httpx.Response:
    data = {"name": name, "trunk": "tiny", "epochs": 3, **fields}
    return server.client.post("/heads", files={"archive": archive}, data=data)


def settle(server: Running, name: str) -> dict[str, Any]:
    """The head once it is neither waiting nor being fitted."""
    wait_until(
        lambda: server.client.get(f"/heads/{name}").json()["state"] not in ("queued", "fitting")
    )
    described: dict[str, Any] = server.client.get(f"/heads/{name}").json()
    return described


def test_an_uploaded_head_is_a_model_at_once(
    server: Running, make: Callable[..., HeadFile], jpegs: dict[str, bytes]
) -> None:
    assert server.client.get("/heads").json() == {"heads": []}
    response = upload(server, "pets", make())
    assert response.status_code == 201, response.text
    described = response.json()
    assert (described["state"], described["task"], described["trunk"]) == (
        "ready", "classify", "tiny")  # fmt: skip
    assert described["head"]["kind"] == "vqt"
    answer = classify(server, "pets", jpegs["chelsea"]).json()
    assert {p["label"] for p in answer["results"][0]["predictions"]} == {"cat", "dog", "cow"}
    assert server.client.get("/models/pets").json()["state"] == "ready"
    [listed] = server.client.get("/heads").json()["heads"]
    assert listed["name"] == "pets"
    content = server.client.get("/heads/pets/head.safetensors").content
    assert decode_head(content).labels == ("cat", "dog", "cow")
    assert server.client.delete("/heads/pets").status_code == 204
    assert classify(server, "pets", jpegs["chelsea"]).status_code == 404
    assert server.client.get("/heads/pets").status_code == 404
    assert server.client.delete("/heads/pets").status_code == 404


def test_many_heads_of_a_request_ride_on_one_pass(
    server: Running, make: Callable[..., HeadFile], jpegs: dict[str, bytes]
) -> None:
    names = [f"head-{number}" for number in range(20)]
    for number, name in enumerate(names):
        assert upload(server, name, make(number)).status_code == 201
    alone = {name: classify(server, name, jpegs["coffee"]).json()["results"][0] for name in names}
    before = server.metric("vitrail_batch_size_count", trunk="tiny")
    answer = server.client.post(
        "/predict", files={"image": jpegs["coffee"]}, data={"models": [*names, "tiny-embed"]}
    ).json()
    assert server.metric("vitrail_batch_size_count", trunk="tiny") == before + 1
    outputs = answer["results"][0]["outputs"]
    for name in names:
        together = {p["label"]: p["score"] for p in outputs[name]["predictions"]}
        for item in alone[name]["predictions"]:
            assert together[item["label"]] == pytest.approx(item["score"], abs=1e-5)
    assert len({json.dumps(alone[name]) for name in names}) == len(names)


def test_heads_come_and_go_under_traffic(
    server: Running, make: Callable[..., HeadFile], jpegs: dict[str, bytes]
) -> None:
    """Neither the trunk's other models nor the head being replaced miss a request."""
    assert upload(server, "stays", make(0)).status_code == 201
    stop = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, headers=server.client.headers) as client:
            while not stop.is_set():
                for model in ("stays", "tiny"):
                    response = client.post(
                        "/classify", params={"model": model}, content=jpegs["coffee"]
                    )
                    statuses.append(response.status_code)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask)
        try:
            for seed in range(8):
                assert upload(server, "passing", make(seed)).status_code == 201
                assert upload(server, "stays", make(seed), replace="true").status_code == 201
                assert server.client.delete("/heads/passing").status_code == 204
            wait_until(lambda: len(statuses) > 16)
        finally:
            stop.set()
    assert set(statuses) == {200}


def test_a_head_is_added_and_told_without_looking_at_the_others(
    server: Running, make: Callable[..., HeadFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the folder is not read any more
    monkeypatch.setattr(server.backend.heads._folder, "_next_scan", math.inf)

    def differences(since: str) -> tuple[list[str], list[str], str]:
        with grpc.insecure_channel(server.grpc) as channel:
            stub, version = VisionStub(channel), since
            metadata = (("authorization", "Bearer admin"),)
            answer = stub.ListModels(pb.ListModelsRequest(since=version), metadata=metadata)
        assert not answer.more
        return [model.name for model in answer.models], list(answer.removed), answer.version

    everything, _, version = differences("")
    assert everything == ["tiny", "tiny-embed", "conv"]
    assert differences(version) == ([], [], version)
    assert upload(server, "one", make()).json()["state"] == "ready"
    told, _, version = differences(version)
    assert told == ["one"]
    assert server.client.get("/heads/one").json()["state"] == "ready"
    assert server.client.delete("/heads/one").status_code == 204
    assert differences(version)[:2] == ([], ["one"])


def test_models_are_listed_in_parts(server: Running, make: Callable[..., HeadFile]) -> None:
    for number in range(2):
        assert upload(server, f"head-{number}", make(number)).status_code == 201
    found: list[str] = []
    start: int | None = 0
    while start is not None:
        answer = server.client.get("/models", params={"start": start, "count": 2}).json()
        found += [model["name"] for model in answer["models"]]
        start = answer.get("next")
    assert found == ["tiny", "tiny-embed", "conv", "head-0", "head-1"]
    whole = server.client.get("/models").json()
    assert [model["name"] for model in whole["models"]] == found
    assert "next" not in whole
    assert server.client.get("/models", params={"count": 0}).status_code == 422


def test_uploads_that_cannot_be_served_say_why(
    server: Running, make: Callable[..., HeadFile]
) -> None:
    head = make()
    assert upload(server, "taken", head).status_code == 201
    wrong = {
        "conflict": [
            upload(server, "taken", head),
            upload(server, "tiny", head),
        ],
        "invalid-input": [
            upload(server, "x", b"not a head"),
            upload(server, "x", encode_head(head)[:-8]),
            upload(server, "x", replace(head, trunk_digest="sha256:other")),
            upload(server, "x", replace(head, trunk="nowhere")),
            upload(server, "x", head, trunk="conv"),
            upload(server, "../x", head),
            upload(server, "x", head, epochs="3"),
            server.client.post("/heads", data={"name": "x"}, files={"other": b""}),
            server.client.post("/heads", json={"name": "x"}),
        ],
        "invalid-parameters": [
            server.client.post("/heads", files={"file": encode_head(head)}),
            upload(server, "x", head, replace="perhaps"),
        ],
    }
    for slug, responses in wrong.items():
        for response in responses:
            assert response.status_code == (409 if slug == "conflict" else 422), response.text
            assert response.json()["type"].endswith(slug), response.text
    [left] = server.client.get("/heads").json()["heads"]
    assert left["name"] == "taken"


def safetensors_file(header: Mapping[str, Any], content: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content


def test_sizes_and_types_of_a_file_are_believed_only_after_a_check(
    server: Running, make: Callable[..., HeadFile], caplog: pytest.LogCaptureFixture
) -> None:
    whole = encode_head(make())
    size = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]

    def entry(dtype: str, shape: list[int], length: int = 0) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}

    def semantic(settings: dict[str, Any]) -> bytes:
        head = {**json.loads(metadata["vitrail-head"]), "kind": "semantic", "task": "segment"}
        kept = {"vitrail-head": json.dumps({**head, "settings": {"layers": [-1], **settings}})}
        tensors = {"decode_head.conv_seg.weight": entry("F32", [1, 1, 1, 1], 4)}
        return safetensors_file({"__metadata__": kept, **tensors}, bytes(4))

    hostile = {
        "empty": safetensors_file(
            {"__metadata__": metadata, "classifier.0.weight": entry("F32", [2_000_000_000, 0])}
        ),
        "type": safetensors_file(
            {"__metadata__": metadata, "x": entry("F4", [2**21], 2**20)}, b"leak" * 2**18
        ),
        "inputs": semantic({"inputs": [100_000_000]}),
        "many inputs": semantic({"inputs": [1] * 100_000}),
        "wrong inputs": semantic({"inputs": [65_000]}),
        "crop": semantic({"inputs": [1], "windows": {"scale": [64, 64], "crop": [10**9, 10**9]}}),
    }
    for name, content in hostile.items():
        refused = upload(server, name.replace(" ", "-"), content)
        assert refused.status_code == 422, (name, refused.text)
        assert len(refused.text) < 2000
    assert "leakleak" not in caplog.text
    assert server.client.get("/heads").json() == {"heads": []}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_answer(
    server: Running, make: Callable[..., HeadFile], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr("models.heads.files.os.fsync", full)
        assert upload(server, "late", make()).status_code == 507
        assert begin_fit(server, "later", tinted_zip()).status_code == 507
    assert upload(server, "late", make()).status_code == 201
    assert not list(heads_folder(server).glob(".tmp-*"))


def test_heads_have_a_bound_together(
    server: Running, make: Callable[..., HeadFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.head_store.MAX_BYTES", 1)
    assert upload(server, "one", make()).status_code == 201
    assert upload(server, "two", make()).status_code == 507


def test_waiting_fits_have_a_bound_and_leave_nothing_behind(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.fit_jobs.MAX_FITS", 2)
    monkeypatch.setattr("service.worker.fit_jobs.MAX_FAILED", 1)
    gate = threading.Event()
    inner = server.backend._fit_jobs._fit

    def held(job: Any) -> Any:
        assert gate.wait(60)
        return inner(job)

    monkeypatch.setattr(server.backend._fit_jobs, "_fit", held)
    for name in ("one", "two"):
        assert begin_fit(server, name, tinted_zip()).status_code == 202
    refused = begin_fit(server, "three", tinted_zip())
    assert refused.status_code == 429
    assert refused.headers["Retry-After"]
    gate.set()
    assert settle(server, "one")["state"] == "ready"
    assert settle(server, "two")["state"] == "ready"
    broken = {f"{label}/{i}.png": b"no image" for label in ("green", "white") for i in range(3)}
    for name in ("three", "four"):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for member, data in broken.items():
                archive.writestr(member, data)
        assert begin_fit(server, name, content.getvalue()).status_code == 202
        assert settle(server, name)["state"] == "failed"
    wait_until(lambda: server.client.get("/heads/three").status_code == 404)
    assert not list(heads_folder(server).glob(".*.lock"))


def test_a_damaged_archive_is_the_clients_error(server: Running) -> None:
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"red/{number}.png", bytes(5000))
            archive.writestr(f"blue/{number}.png", bytes(5000))
    content = bytearray(deflated.getvalue())
    start = content.index(b"red/0.png") + len(b"red/0.png")
    content[start : start + 8] = b"\xff" * 8
    refused = begin_fit(server, "broken", bytes(content))
    assert refused.status_code == 422, refused.text


@pytest.mark.parametrize("kind", [{}, {"kind": "lora"}])
def test_the_files_of_an_archive_are_counted_before_they_are_listed(
    server: Running, kind: dict[str, str]
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a", b"")
    whole = content.getvalue()
    listed, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    many = whole[:listed] + whole[listed:end] * 100_001 + whole[end:]
    headers = {"Content-Type": "application/zip"}
    parameters = {"name": "many", "trunk": "tiny", **kind}
    refused = server.client.post("/heads", content=many, params=parameters, headers=headers)
    assert refused.status_code == 422
    assert "more than" in refused.json()["detail"]


def test_the_series_of_deleted_heads_are_removed(
    server: Running, make: Callable[..., HeadFile], jpegs: dict[str, bytes]
) -> None:
    assert upload(server, "passing-by", make()).status_code == 201
    for model in ("passing-by", "tiny"):
        assert classify(server, model, jpegs["coffee"]).status_code == 200
    assert 'model="passing-by"' in server.client.get("/metrics").text
    assert server.client.delete("/heads/passing-by").status_code == 204
    wait_until(lambda: 'model="passing-by"' not in server.client.get("/metrics").text)
    assert 'model="tiny"' in server.client.get("/metrics").text


def test_shared_gauges_of_what_is_gone_are_zero() -> None:
    class Source(Collector):
        names: Sequence[str] = ("stays", "goes")

        def collect(self) -> Iterator[Metric]:
            family = GaugeMetricFamily("vitrail_test", "A gauge.", labels=("model",))
            for name in self.names:
                family.add_metric((name,), 1)
            yield family

    source, shared = Source(), SharedGauges()
    shared.update(source)
    source.names = ("stays",)
    shared.update(source)
    [family] = shared._registry.collect()
    values = {sample.labels["model"]: sample.value for sample in family.samples}
    assert values == {"stays": 1, "goes": 0}


def test_changing_heads_needs_the_admin_key_where_there_is_one(
    server: Running, make: Callable[..., HeadFile]
) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        assert stranger.post("/heads", files={"file": encode_head(make())}).status_code == 401
        assert stranger.delete("/heads/x").status_code == 401
        assert stranger.get("/heads").status_code == 200


# -- fitting -----------------------------------------------------------------------------------


def test_a_head_is_fitted_in_the_background(server: Running) -> None:
    fitted = server.metric("vitrail_fits_total", outcome="ok")
    response = begin_fit(server, "tints", tinted_zip(20), epochs=20, seed=1)
    assert response.status_code == 202, response.text
    assert response.json()["state"] in ("queued", "fitting")
    described = settle(server, "tints")
    assert described["state"] == "ready"
    assert described["head"]["training"]["images"] == 40
    for part, kind in (("report.json", "application/json"), ("curve.png", "image/png"),
                       ("confusion.png", "image/png")):  # fmt: skip
        found = server.client.get(f"/heads/tints/{part}")
        assert found.headers["Content-Type"] == kind
    report = server.client.get("/heads/tints/report.json").json()
    assert report["images_by_class"] == {"red": 20, "blue": 20}
    right = 0
    for label in ("red", "blue"):
        for seed in range(10):
            answer = classify(server, "tints", tinted(label, 7000 + seed)).json()
            right += answer["results"][0]["predictions"][0]["label"] == label
    assert right >= 18
    assert server.metric("vitrail_fits_total", outcome="ok") == fitted + 1
    assert server.client.get("/heads/tints/secret").status_code == 404
    assert server.client.get("/heads/..%2Ftiny/head.safetensors").status_code == 404


def test_a_fitted_head_is_known_while_it_is_declared(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []

    def read_and_ask(path: Path) -> HeadFile:
        head = read_head(path)
        states.append(server.client.get("/heads/tints").json().get("state"))
        return head

    monkeypatch.setattr("service.worker.head_store.read_head", read_and_ask)
    assert begin_fit(server, "tints", tinted_zip()).status_code == 202
    assert settle(server, "tints")["state"] == "ready"
    assert states == ["fitting"]


def test_images_may_come_one_by_one(server: Running) -> None:
    images = [("red", tinted("red", 1)), ("red", tinted("red", 2)),
              ("blue", tinted("blue", 3)), ("blue", tinted("blue", 4))]  # fmt: skip
    parts = [("image", ("photo", image)) for _, image in images]
    data = {"name": "parts", "trunk": "tiny", "kind": "linear", "label": [n for n, _ in images]}
    response = server.client.post("/heads", files=parts, data=data)
    assert response.status_code == 202, response.text
    items = [{"base64": base64.b64encode(image).decode(), "label": n} for n, image in images]
    response = server.client.post(
        "/heads", json={"name": "json", "trunk": "conv", "kind": "linear", "images": items}
    )
    assert response.status_code == 202, response.text
    assert settle(server, "parts")["state"] == "ready"
    assert settle(server, "json")["labels"] == 2


def test_fits_that_cannot_come_to_anything_are_refused(server: Running) -> None:
    good = tinted_zip()
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("red/1.png", tinted("red", 1))
        archive.writestr("blue/1.png", tinted("blue", 1))
        archive.writestr("blue/2.png", tinted("blue", 2))
    for response, message in (
        (begin_fit(server, "x", b"no archive"), "cannot be read"),
        (begin_fit(server, "x", one.getvalue()), "a single image of red"),
        (begin_fit(server, "x", good, kind="magic"), "kind"),
        (begin_fit(server, "x", good, epochs=0), "epochs is 0"),
        (begin_fit(server, "x", good, trunk="nowhere"), "no trunk 'nowhere'"),
        (begin_fit(server, "x", good, trunk="conv"), "blocks of a plain ViT"),
        (begin_fit(server, "x", good, momentum=3), "momentum"),
        (begin_fit(server, "x/y", good), "name is 'x/y'"),
        (server.client.post("/heads", files={"image": b"1"}, data={"name": "x", "trunk": "tiny"}),
         "1 images and 0 labels"),
    ):  # fmt: skip
        assert response.status_code == 422, response.text
        assert message in response.json()["detail"]
    assert begin_fit(server, "tiny", good).status_code == 409
    assert server.client.get("/heads").json() == {"heads": []}


def test_unreadable_images_fail_a_fit_only_if_too_few_are_left(
    server: Running, make: Callable[..., HeadFile]
) -> None:
    some = tinted_zip(extra={"red/bad.png": b"broken"})
    assert begin_fit(server, "some", some).status_code == 202
    assert settle(server, "some")["state"] == "ready"
    skipped = server.client.get("/heads/some/report.json").json()["skipped"]
    assert [item["name"] for item in skipped] == ["red/bad.png"]
    few = tinted_zip(extra={"third/1.png": tinted("blue", 1), "third/2.png": b"broken"})
    assert begin_fit(server, "few", few).status_code == 202
    failed = settle(server, "few")
    assert failed["state"] == "failed"
    assert "a single image of third" in failed["reason"]
    assert "third/2.png" in failed["reason"]
    # a head that came since is not hidden by the failure
    assert upload(server, "few", make()).status_code == 201
    assert settle(server, "few")["state"] == "ready"
    assert server.client.delete("/heads/few").status_code == 204
    # it may be tried again
    assert begin_fit(server, "few", tinted_zip()).status_code == 202
    assert settle(server, "few")["state"] == "ready"


def test_two_fits_at_once_and_one_given_up(server: Running, jpegs: dict[str, bytes]) -> None:
    """They run one after another; the same name waits for nobody; serving goes on meanwhile."""
    assert begin_fit(server, "long", tinted_zip(40), epochs=5000, patience=5000).status_code == 202
    assert begin_fit(server, "short", tinted_zip()).status_code == 202
    assert begin_fit(server, "short", tinted_zip()).status_code == 409
    wait_until(
        lambda: (
            server.client.get("/heads/long").json().get("progress", {}).get("stage") == "training"
        )
    )
    assert server.client.get("/heads/short").json()["state"] == "queued"
    assert classify(server, "tiny", jpegs["coffee"]).status_code == 200
    assert server.client.delete("/heads/long").status_code == 204
    assert settle(server, "short")["state"] == "ready"
    assert server.client.get("/heads/long").status_code == 404


# -- the folder --------------------------------------------------------------------------------


def test_the_folder_is_what_is_served(
    server: Running, make: Callable[..., HeadFile], jpegs: dict[str, bytes]
) -> None:
    """As after `vitrail fit`, or where several workers share one."""
    folder = heads_folder(server)
    (folder / "dropped.safetensors").write_bytes(encode_head(make()))
    (folder / "broken.safetensors").write_bytes(b"broken")
    (folder / "stranger.safetensors").write_bytes(encode_head(make(trunk_digest="sha256:other")))

    def state(name: str) -> str | None:
        heads = server.client.get("/heads").json()["heads"]
        return next((head["state"] for head in heads if head["name"] == name), None)

    wait_until(lambda: state("dropped") == "ready")
    wait_until(lambda: classify(server, "dropped", jpegs["coffee"]).status_code == 200)
    assert "not a readable" in server.client.get("/heads/broken").json()["reason"]
    assert "another trunk" in server.client.get("/heads/stranger").json()["reason"]
    (folder / "dropped.safetensors").unlink()
    wait_until(lambda: state("dropped") is None)


def test_heads_and_unfinished_fits_survive_a_kill(
    tiny_catalog: Path, make: Callable[..., HeadFile], tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("serve", "--port", str(port), "--catalog", str(tiny_catalog), "--device", "cpu")
    environment = {"VITRAIL_HEADS_FOLDER": str(tmp_path / "heads"), "VITRAIL_LOG_LEVEL": "warning"}

    def ask(model: str) -> Any:
        return httpx.post(
            f"{url}/classify", params={"model": model}, content=jpegs["coffee"]
        ).json()

    with process(*arguments, **environment) as first:
        wait_until(lambda: answers(f"{url}/readyz"), 120)
        sent = httpx.post(
            f"{url}/heads", files={"file": encode_head(make())}, data={"name": "kept"}
        )
        assert sent.status_code == 201
        before = ask("kept")
        data = {"name": "begun", "trunk": "tiny", "epochs": 20, "patience": 20}
        sent = httpx.post(f"{url}/heads", files={"archive": tinted_zip(10)}, data=data)
        assert sent.status_code == 202
        first.kill()
        first.wait()
    with process(*arguments, **environment):
        wait_until(lambda: answers(f"{url}/readyz"), 120)
        assert ask("kept") == before
        wait_until(lambda: httpx.get(f"{url}/heads/begun").json()["state"] == "ready", 200)


def test_heads_over_grpc(server: Running, make: Callable[..., HeadFile]) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = VisionStub(channel)
        metadata = (("x-api-key", "admin"),)
        content = encode_head(make())
        put = pb.PutHeadRequest(name="pets", content=content)
        assert stub.PutHead(put, metadata=metadata).head.ready
        with pytest.raises(grpc.RpcError) as caught:
            stub.PutHead(put, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        with pytest.raises(grpc.RpcError) as caught:
            stub.PutHead(put)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert [head.name for head in stub.ListHeads(pb.ListHeadsRequest()).heads] == ["pets"]
        read = stub.ReadHead(pb.ReadHeadRequest(name="pets", part="head.safetensors")).content
        assert decode_head(read).labels == ("cat", "dog", "cow")
        fit = pb.FitHeadRequest(name="fitted", trunk="tiny", archive=tinted_zip())
        fit.options.update({"kind": "linear", "epochs": 2})
        assert not stub.FitHead(fit, metadata=metadata).head.ready
        wait_until(
            lambda: any(
                head.name == "fitted" and head.ready
                for head in stub.ListHeads(pb.ListHeadsRequest()).heads
            )
        )
        for name in ("pets", "fitted"):
            stub.DeleteHead(pb.DeleteHeadRequest(name=name), metadata=metadata)
        assert not stub.ListHeads(pb.ListHeadsRequest()).heads


# -- published heads through the server --------------------------------------------------------

PUBLISHED = ("dino_linear", "moco_v3_linear", "vqt", "vqt_mae", "vqt_wsum")


@pytest.mark.parametrize("way", WAYS)
def test_published_heads_answer_the_authors_numbers(tmp_path: Path, way: str) -> None:
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    lines = []
    for name in PUBLISHED:
        heads = json.loads((GOLDENS / name / "meta.json").read_text())["hyperparameters"]
        lines.append(
            f'[trunks.{name}]\nsource = "file:{GOLDENS / name / "checkpoint.pth"}"\n'
            f"arguments = {{num_heads = {heads['num_heads']}}}\n"
            f'[models.{name}]\ntrunk = "{name}"\ntask = "classify"\n'
        )
    catalog = tmp_path / "published.toml"
    catalog.write_text("\n".join(lines))
    with running(catalog, apart="apart" in way) as server:
        server.wait_ready()
        for name in PUBLISHED:
            golden = load_file(GOLDENS / name / "golden.safetensors")
            pixels = golden["pixel_values"]
            body = {
                "inputs": [{"name": "pixel_values", "datatype": "FP32",
                            "shape": list(pixels.shape), "data": pixels.flatten().tolist()}],
                "outputs": [{"name": "probabilities"}],
            }  # fmt: skip
            response = server.client.post(f"/v2/models/{name}/infer", json=body)
            assert response.status_code == 200, response.text
            [output] = response.json()["outputs"]
            found = np.array(output["data"], np.float32).reshape(output["shape"])
            wanted = golden["logits"].softmax(-1).numpy()
            assert np.allclose(found, wanted, atol=1e-5), name
