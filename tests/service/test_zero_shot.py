"""Zero-shot and text embeddings against open_clip's own, over REST and gRPC, apart and together."""

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import open_clip
import pytest
import torch
from google.protobuf.struct_pb2 import Struct
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from models.inputs.images import decode_image
from models.inputs.normalize import Normalize
from models.inputs.prompts import NAMED_TEMPLATES
from models.inputs.tokenizers import OpenAITokenizer
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.tensors import from_bytes
from tests.conftest import Running, encode, running, wait_until

LABELS = ["cat", "dog", "coffee", "rocket"]


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def server(clip: tuple[Path, Any], request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(clip[0], apart="apart" in request.param) as started:
        started.wait_ready()
        yield started


@torch.inference_mode()
def text_features(network: Any, texts: list[str]) -> torch.Tensor:
    return normalize(network.encode_text(OpenAITokenizer(77)(texts)), dim=-1)


@torch.inference_mode()
def image_features(server: Running, network: Any, jpeg: bytes) -> torch.Tensor:
    model = server.backend.registry.get("clip")
    pixels = model.trunk.prepare(decode_image(jpeg))[None]
    return normalize(network.encode_image(Normalize(model.trunk.preprocess)(pixels)), dim=-1)[0]


def expected(
    server: Running, network: Any, jpeg: bytes, templates: tuple[str, ...] = ("a photo of a {}.",)
) -> dict[str, torch.Tensor]:
    """Each label's scaled similarity, by open_clip's own model."""
    image = image_features(server, network, jpeg)
    found = {}
    for label in LABELS:
        texts = [template.replace("{}", label) for template in templates]
        mean = normalize(text_features(network, texts).mean(0), dim=-1)
        found[label] = network.logit_scale.detach().exp() * (image @ mean)
    return found


def ask(server: Running, jpeg: bytes, **options: Any) -> httpx.Response:
    files = [("image", ("x", jpeg))]
    return server.client.post("/zero-shot", files=files, data={"labels": LABELS, **options})


def scores(response: httpx.Response) -> dict[str, float]:
    assert response.status_code == 200, response.text
    predictions = response.json()["results"][0]["predictions"]
    values = [item["score"] for item in predictions]
    assert values == sorted(values, reverse=True)
    return {item["label"]: item["score"] for item in predictions}


@pytest.mark.parametrize("templates", [None, "imagenet-7", "imagenet-80"])
def test_scores_are_open_clips(
    server: Running, clip: tuple[Path, Any], jpegs: dict[str, bytes], templates: str | None
) -> None:
    named = NAMED_TEMPLATES[templates] if templates else ("a photo of a {}.",)
    logits = expected(server, clip[1], jpegs["chelsea"], named)
    options = {"templates": templates} if templates else {}
    got = scores(ask(server, jpegs["chelsea"], **options))
    softmax = torch.stack(list(logits.values())).softmax(0)
    for label, score in zip(logits, softmax, strict=True):
        assert got[label] == pytest.approx(float(score), abs=1e-5)


def test_labels_may_be_scored_each_by_itself(
    server: Running, clip: tuple[Path, Any], jpegs: dict[str, bytes]
) -> None:
    got = scores(ask(server, jpegs["coffee"], multi_label="true"))
    for label, logit in expected(server, clip[1], jpegs["coffee"]).items():
        assert got[label] == pytest.approx(float(logit.sigmoid()), abs=1e-5)


@pytest.mark.parametrize("labels", ['["a cat", "a dog"]', "['a cat']"])
def test_a_list_in_one_field_is_refused(
    server: Running, jpegs: dict[str, bytes], labels: str
) -> None:
    answer = ask(server, jpegs["coffee"], labels=labels)
    assert answer.status_code == 422
    assert "repeat the field" in answer.json()["detail"]
    files = [("image", ("x", jpegs["coffee"]))]
    in_query = server.client.post("/zero-shot", params={"labels": labels}, files=files)
    assert in_query.status_code == 422
    assert scores(ask(server, jpegs["coffee"], labels=["[MASK]", "a [b]"])).keys() == {
        "[MASK]",
        "a [b]",
    }


def test_grpc_gives_the_same(server: Running, jpegs: dict[str, bytes]) -> None:
    options = Struct()
    options.update({"labels": LABELS})
    with grpc.insecure_channel(server.grpc) as channel:
        vision: Any = VisionStub(channel)
        ask_rpc = pb.TaskRequest(images=[jpegs["chelsea"]], options=options)
        [result] = vision.ZeroShot(ask_rpc).results
        [text] = vision.Embed(pb.TaskRequest(texts=["a cat"])).results
    tensors = {
        t.name: from_bytes(t.name, t.datatype, t.shape, t.contents)
        for t in (*result.tensors, *text.tensors)
    }
    rest = scores(ask(server, jpegs["chelsea"]))
    got = dict(zip(tensors["label"].tolist(), tensors["score"].tolist(), strict=True))
    assert got == pytest.approx(rest, abs=1e-6)
    embedded = server.client.post("/embed", json={"texts": ["a cat"]}).json()["results"][0]
    assert np.allclose(tensors["embedding"], embedded["embedding"], atol=1e-6)


def test_texts_and_images_embed_into_one_space(
    server: Running, clip: tuple[Path, Any], jpegs: dict[str, bytes]
) -> None:
    texts = ["a cat", "a dog on the moon", "犬"]
    answer = server.client.post("/embed", json={"texts": texts, "model": "clip"}).json()
    got = [entry["embedding"] for entry in answer["results"]]
    assert np.allclose(got, text_features(clip[1], texts).numpy(), atol=1e-5)
    image = server.client.post("/embed?model=clip", content=jpegs["rocket"]).json()
    wanted = image_features(server, clip[1], jpegs["rocket"]).numpy()
    assert np.allclose(image["results"][0]["embedding"], wanted, atol=1e-5)
    assert answer["model_digest"] == image["model_digest"]
    alone = server.client.post("/embed", data={"texts": texts, "model": "texts"}).json()
    assert np.allclose([e["embedding"] for e in alone["results"]], got, atol=1e-6)


def test_the_open_inference_protocol_takes_texts_and_labels(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    def infer(model: str, name: str, element: str, **parameters: Any) -> dict[str, Any]:
        tensor = {"name": name, "datatype": "BYTES", "shape": [1], "data": [element]}
        body = {"inputs": [tensor], "parameters": parameters}
        answer = server.client.post(f"/v2/models/{model}/infer", json=body)
        assert answer.status_code == 200, answer.text
        return {output["name"]: output["data"] for output in answer.json()["outputs"]}

    embedded = server.client.post("/embed", json={"texts": ["a cat"], "model": "texts"}).json()
    got = infer("texts", "text", "a cat")["embedding"]
    assert np.allclose(got, embedded["results"][0]["embedding"], atol=1e-6)
    image = base64.b64encode(jpegs["chelsea"]).decode()
    scored = infer("clip", "image", image, labels=LABELS)
    rest = scores(ask(server, jpegs["chelsea"]))
    assert dict(zip(scored["label"], scored["score"], strict=True)) == pytest.approx(rest, abs=1e-6)
    inputs = server.client.get("/v2/models/texts").json()["inputs"]
    assert [entry["name"] for entry in inputs] == ["text"]


def test_vectors_come_shorter_and_in_fewer_bits(server: Running) -> None:
    def embed(**options: Any) -> Any:
        body = {"texts": ["a cat"], **options}
        return server.client.post("/embed", json=body).json()["results"][0]["embedding"]

    whole = np.array(embed())
    short = np.array(embed(dimensions=8, truncate=True))
    assert np.allclose(short, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    assert embed(encoding="int8") == np.rint(whole * 127).astype(int).tolist()
    assert embed(encoding="binary") == np.packbits(whole > 0).tolist()


def hits(server: Running) -> tuple[float, float]:
    name = "vitrail_label_sets_total"
    return server.metric(name, result="hit"), server.metric(name, result="miss")


def passes(server: Running) -> float:
    return server.metric("vitrail_batch_size_count", trunk="clip-text")


def test_a_label_set_is_read_once(server: Running, jpegs: dict[str, bytes]) -> None:
    data = {"labels": ["apple", "pear"]}
    first = server.client.post("/zero-shot", files=[("image", jpegs["coffee"])], data=data)
    before = passes(server)
    hit, miss = hits(server)
    again = server.client.post("/zero-shot", files=[("image", jpegs["coffee"])], data=data)
    assert again.json()["results"] == first.json()["results"]
    assert passes(server) == before
    assert hits(server) == (hit + 1, miss)


def test_first_requests_at_once_share_one_reading(
    server: Running, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = server.backend.trunks.runners["clip-text"].trunk
    gate, texts = threading.Event(), []
    forward = trunk.forward

    def wait(batch: torch.Tensor, need: Any) -> Any:
        texts.append(len(batch))
        assert gate.wait(30)
        return forward(batch, need)

    monkeypatch.setattr(trunk, "forward", wait)
    _, miss = hits(server)
    data = {"labels": ["kiwi", "plum", "fig"]}

    def post() -> int:
        files = [("image", jpegs["rocket"])]
        return httpx.post(f"{server.url}/zero-shot", files=files, data=data, timeout=60).status_code

    with ThreadPoolExecutor(30) as pool:
        futures = [pool.submit(post) for _ in range(30)]
        try:
            wait_until(lambda: hits(server)[1] == miss + 30)
        finally:
            gate.set()
        assert [future.result() for future in futures] == [200] * 30
    assert sum(texts) == 3


def test_a_catalogs_label_set_is_ready_before_the_first_request(
    clip: tuple[Path, Any], jpegs: dict[str, bytes]
) -> None:
    with running(clip[0]) as fresh:
        fresh.wait_ready()
        files = [("image", jpegs["coffee"])]
        answer = fresh.client.post("/zero-shot?model=clip-named", files=files)
        labels = {item["label"] for item in answer.json()["results"][0]["predictions"]}
        assert labels == {"cat", "dog", "coffee"}
        assert hits(fresh) == (1, 0)
        assert passes(fresh) == 0


def test_an_answer_with_long_labels_is_bounded(server: Running) -> None:
    image = {"base64": base64.b64encode(encode(Image.new("RGB", (8, 8)))).decode()}
    body = {"labels": [f"{number} {'x' * 700}" for number in range(1000)], "images": [image] * 64}
    answer = server.client.post("/zero-shot", json=body)
    assert answer.status_code == 413, answer.text[:300]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/zero-shot", {"labels": []}, 422, "labels"),
        ("/zero-shot", {}, 422, "labels are missing"),
        ("/zero-shot", {"labels": ["a", "a"]}, 422, "repeated"),
        ("/zero-shot", {"labels": ["a", " "]}, 422, "empty"),
        ("/zero-shot", {"labels": ["x" * 10_000_000]}, 422, "characters"),
        ("/zero-shot", {"labels": [str(n) for n in range(1001)]}, 422, "1000"),
        ("/zero-shot", {"labels": ["a"], "templates": ["no place"]}, 422, "{}"),
        ("/zero-shot", {"labels": ["a"], "model": "images"}, 422, "does not do"),
        ("/embed", {"model": "images", "texts": ["a"]}, 422, "not both"),
        ("/embed", {"model": "texts"}, 422, "takes texts"),
        ("/embed", {"dimensions": 1000, "truncate": True}, 422, "48"),
        ("/embed", {"dimensions": 8}, 422, "truncate"),
        ("/embed", {"pooling": "mean"}, 422, "one embedding"),
    ],
)
def test_wrong_use_is_told(
    server: Running,
    jpegs: dict[str, bytes],
    path: str,
    body: dict[str, Any],
    status: int,
    says: str,
) -> None:
    image = {"base64": base64.b64encode(jpegs["coffee"]).decode()}
    answer = server.client.post(path, json={"images": [image], **body})
    assert answer.status_code == status, answer.text[:300]
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"texts": ["a"], "model": "images"}, "takes images, not texts; models that take texts: "),
        ({"texts": []}, "texts"),
        ({"texts": [" "]}, "empty"),
        ({"texts": ["x" * 20_000]}, "characters"),
    ],
)
def test_wrong_texts_are_told(server: Running, body: dict[str, Any], says: str) -> None:
    answer = server.client.post("/embed", json=body)
    assert answer.status_code == 422, answer.text[:300]
    assert says in answer.json()["detail"]


FAMILY_CATALOG = """
[trunks.image]
source = "file:weights.safetensors"
library = "open_clip"
architecture = "NAME"

[trunks.text]
source = "file:weights.safetensors"
library = "open_clip"
architecture = "NAME"
tower = "text"

[models.family]
trunk = "image"
text = "text"
task = "zero-shot"
"""


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "MobileCLIP-S1", "EVA02-B-16"])
def test_open_clips_families_are_served_from_their_files(
    name: str, jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = open_clip.create_model(name).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "catalog.toml").write_text(FAMILY_CATALOG.replace("NAME", name))
    texts = open_clip.get_tokenizer(name)([f"a photo of a {label}." for label in LABELS])
    with running(tmp_path / "catalog.toml", apart=True, max_batch_size=2) as served:
        served.wait_ready()
        model = served.backend.registry.get("family")
        image = model.trunk.prepare(decode_image(jpegs["rocket"]))[None]
        with torch.inference_mode():
            pixels = Normalize(model.trunk.preprocess)(image)
            seen = network.encode_image(pixels, normalize=True)
            read = network.encode_text(texts, normalize=True)
            wanted = (network.logit_scale.exp() * seen @ read.T).softmax(-1)[0].tolist()
        got = scores(ask(served, jpegs["rocket"]))
        assert [got[label] for label in LABELS] == pytest.approx(wanted, abs=1e-5)
        options = Struct()
        options.update({"labels": LABELS})
        with grpc.insecure_channel(served.grpc) as channel:
            vision: Any = VisionStub(channel)
            request = pb.TaskRequest(images=[jpegs["rocket"]], options=options)
            [result] = vision.ZeroShot(request).results
            [embedded] = vision.Embed(pb.TaskRequest(images=[jpegs["rocket"]])).results
        tensors = {
            t.name: from_bytes(t.name, t.datatype, t.shape, t.contents)
            for t in (*result.tensors, *embedded.tensors)
        }
        by_label = dict(zip(tensors["label"].tolist(), tensors["score"].tolist(), strict=True))
        assert [by_label[label] for label in LABELS] == pytest.approx(wanted, abs=1e-5)
        assert np.allclose(tensors["embedding"], seen[0].numpy(), atol=1e-5)
