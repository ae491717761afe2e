"""/segment: forms, windows, prompts and one pass shared, over REST, gRPC and the open protocol."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from models import Registry, load_checkpoint
from models.checkpoints.checkpoint import HeadState
from models.checkpoints.store import Store
from models.heads.files import HeadFile, encode_head
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.types import ImageResult
from service.worker import request_run
from service.worker.execution_plan import ExecutionPlan
from service.worker.postprocess import finish_input, is_slow
from tests.conftest import CLIP_CATALOG, Running, encode, running, wait_until
from tests.models.test_fixtures import GOLDENS

WAYS = ["in one process", "gateway and worker apart"]
MODELS = """
[models.cut]
trunk = "tiny"
task = "segment"
head = "tokencut"

[models.looks]
trunk = "tiny"
task = "segment"
head = "attention-mask"

[models.parts]
trunk = "clip-image"
text = "clip-text"
task = "segment"
head = "dense-clip"
"""


@pytest.fixture(scope="module", params=WAYS)
def server(
    tiny_catalog: Path, clip: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Running]:  # fmt: skip
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    text += CLIP_CATALOG.partition("[trunks.clip-image]")[2].replace(
        "file:", f"file:{clip[0].parent}/"
    ).join(["[trunks.clip-image]", MODELS])  # fmt: skip
    folder = tmp_path_factory.mktemp("segment")
    (folder / "catalog.toml").write_text(text)
    apart = "apart" in request.param
    heads = str(folder / "heads")
    with running(folder / "catalog.toml", apart=apart, heads_folder=heads) as started:
        started.wait_ready()
        yield started


QUEUE = 8


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """mmsegmentation's layouts from the fixtures, with short queues."""
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    text = ""
    for name in ("semantic_segmentation", "semantic_segmentation_convnext"):
        text += f'[trunks.{name}]\nsource = "file:{GOLDENS / name}/checkpoint.pth"\n'
        text += f'[models.{name}]\ntrunk = "{name}"\ntask = "segment"\n'
        text += f'[models.{name}-embed]\ntrunk = "{name}"\ntask = "embed"\n'
    path = tmp_path_factory.mktemp("mmseg") / "catalog.toml"
    path.write_text(text)
    with running(path, max_queue_size=QUEUE) as started:
        started.wait_ready()
        yield started


def segment(server: Running, image: bytes, **options: Any) -> dict[str, Any]:
    answer = server.client.post("/segment", files={"image": image}, data=options)
    assert answer.status_code == 200, answer.text[:300]
    result: dict[str, Any] = answer.json()["results"][0]
    return result


def array(encoded: str) -> np.ndarray:
    loaded: np.ndarray = np.load(io.BytesIO(base64.b64decode(encoded)))
    return loaded


def png(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools.decode
@pytest.mark.parametrize("model", ["cut", "looks"])
def test_all_forms_show_one_mask(server: Running, model: str, jpegs: dict[str, bytes]) -> None:
    image = jpegs["rocket"]
    by_form = {
        form: segment(server, image, model=model, output=form)
        for form in ("png", "rle", "polygons", "mask", "overlay", "logits")
    }
    mask = array(by_form["mask"]["mask"])
    assert mask.shape == (by_form["png"]["height"], by_form["png"]["width"])
    np.testing.assert_array_equal(np.asarray(png(by_form["png"]["mask"])), mask)
    np.testing.assert_array_equal(coco.decode(by_form["rle"]["mask"]), mask)
    assert png(by_form["overlay"]["mask"]).size == mask.shape[::-1]
    assert array(by_form["logits"]["mask"]).ndim == 3
    for answer in by_form.values():
        assert [item["pixels"] for item in answer["classes"]] == np.bincount(
            mask.ravel(), minlength=2
        ).tolist()


def test_decoding_does_not_wait_for_masks(
    server: Running, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_finish, waiting = threading.Event(), []

    def slowly(plan: ExecutionPlan, *arguments: Any) -> ImageResult:
        if is_slow(plan):
            waiting.append(plan)
            assert may_finish.wait(60)
        return finish_input(plan, *arguments)

    monkeypatch.setattr(request_run, "finish_input", slowly)
    with ThreadPoolExecutor(16) as clients:
        masks = [clients.submit(segment, server, jpegs["rocket"], model="cut") for _ in range(16)]
        try:
            wait_until(lambda: len(waiting) >= server.backend.options.decode_threads)
            answer = server.client.post("/classify", content=jpegs["coffee"])
        finally:
            may_finish.set()
        assert answer.status_code == 200
        assert all("mask" in mask.result() for mask in masks)


def test_small_regions_can_be_left_out(server: Running, jpegs: dict[str, bytes]) -> None:
    everything = segment(server, jpegs["rocket"], model="looks", threshold=0.9)
    nothing = segment(server, jpegs["rocket"], model="looks", threshold=0.9, min_area=10**7)
    assert everything["classes"][1]["pixels"] > 0
    assert nothing["classes"][1]["pixels"] == 0


def test_parts_are_found_by_any_words(server: Running, jpegs: dict[str, bytes]) -> None:
    labels = ["a rocket", "der Himmel", "草地"]
    answer = segment(server, jpegs["rocket"], model="parts", labels=labels)
    assert {item["label"] for item in answer["classes"]} <= set(labels)
    mask = np.asarray(png(answer["mask"]))
    assert set(np.unique(mask).tolist()) == {item["index"] for item in answer["classes"]}
    by_class = segment(server, jpegs["rocket"], model="parts", labels=labels, output="rle")
    assert [item["label"] for item in by_class["mask"]] == [c["label"] for c in answer["classes"]]
    sure = segment(server, jpegs["rocket"], model="parts", labels=labels, threshold=1)
    assert [item["label"] for item in sure["classes"]][-1] == "unlabelled"
    many = [f"thing {i}" for i in range(150)]
    assert segment(server, jpegs["rocket"], model="parts", labels=many)["classes"]
    for fields, message in (
        ({"model": "parts"}, "labels are missing"),
        ({"model": "cut", "labels": ["a"]}, "not prompted"),
        ({"model": "parts", "labels": ["a", "b"], "templates": ["none"]}, "template"),
        ({"model": "tiny"}, "does not do"),
        ({"model": "cut", "output": "gif"}, "output"),
        ({"model": "cut", "min_area": -1}, "min_area"),
    ):
        response = server.client.post("/segment", files={"image": jpegs["rocket"]}, data=fields)
        assert response.status_code == 422, response.text[:300]
        assert message in response.json()["detail"]
    too_many = [f"thing {i}" for i in range(300)]
    files, prompts = {"image": jpegs["rocket"]}, {"model": "parts", "labels": too_many}
    response = server.client.post("/segment", files=files, data=prompts)
    assert "255 classes" in response.text


def test_prompted_labels_are_the_librarys(server: Running, jpegs: dict[str, bytes]) -> None:
    labels = ["cat", "grass", "sky"]
    served = segment(server, jpegs["chelsea"], model="parts", labels=labels, output="mask")
    catalog = server.backend.registry
    [own] = catalog.get("parts").predict([jpegs["chelsea"]], labels=labels, output="mask")
    assert (array(served["mask"]) == array(own["mask"])).mean() > 0.9999


def test_one_pass_segments_classifies_and_embeds(server: Running, jpegs: dict[str, bytes]) -> None:
    before = server.metric("vitrail_batch_size_count", trunk="tiny")
    answer = server.client.post(
        "/predict",
        files={"image": jpegs["coffee"]},
        data={"models": ["cut", "looks", "tiny", "tiny-embed"]},
    )
    outputs = answer.json()["results"][0]["outputs"]
    assert {"mask", "predictions", "embedding"} <= {key for out in outputs.values() for key in out}
    assert server.metric("vitrail_batch_size_count", trunk="tiny") - before == 1


def test_masks_are_tensors_over_grpc_and_the_open_protocol(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    image = jpegs["chelsea"]
    rest = array(segment(server, image, model="cut", output="mask")["mask"])
    request = pb.TaskRequest(images=[image], model="cut")
    request.options.update({"output": "mask"})
    with grpc.insecure_channel(server.grpc) as channel:
        stub = VisionStub(channel)
        [result] = stub.Segment(request).results
    tensors = {tensor.name: tensor for tensor in result.tensors}
    assert tensors["mask"].datatype == "UINT8"
    mask = np.frombuffer(tensors["mask"].contents, np.uint8).reshape(tensors["mask"].shape)
    np.testing.assert_array_equal(mask, rest)
    body = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1],
                    "data": [base64.b64encode(image).decode()]}],
        "outputs": [{"name": "mask"}],
    }  # fmt: skip
    [output] = server.client.post("/v2/models/cut/infer", json=body).json()["outputs"]
    assert output["shape"] == [1, 300, 451]
    np.testing.assert_array_equal(np.array(output["data"], np.uint8).reshape(300, 451), rest)


def test_a_picture_or_array_itself_can_be_the_answer(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    for form, accept in (("png", "image/png"), ("overlay", "image/png"),
                         ("logits", "application/x-npy")):  # fmt: skip
        answer = server.client.post(
            "/segment",
            params={"model": "cut", "output": form},
            content=jpegs["coffee"],
            headers={"Accept": accept, "Content-Type": "image/jpeg"},
        )
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, accept)


def test_a_segmenter_can_be_uploaded(
    server: Running, tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    registry = Registry.from_catalog(
        tiny_catalog, device="cpu", store=Store(tiny_catalog.parent / "store")
    )
    trunk = registry.load_trunk("tiny").trunk
    network: Any = trunk.network
    dim = network.embed_dim
    weights = {
        "decode_head.conv_seg.weight": torch.randn(21, dim, 1, 1),
        "decode_head.conv_seg.bias": torch.zeros(21),
    }
    settings = {"layers": [-1], "normed": True, "inputs": [dim], "labels": "voc-21"}
    labels = tuple(f"class {i}" for i in range(21))
    head = HeadFile(
        kind="semantic",
        task="segment",
        trunk="tiny",
        trunk_digest=trunk.digest,
        preprocess_digest=trunk.preprocess.digest,
        labels=labels,
        state=HeadState(weights, settings),
    )
    response = server.client.post(
        "/heads", files={"file": encode_head(head)}, data={"name": "voc", "replace": "true"}
    )
    assert response.status_code == 201, response.text[:300]
    answer = segment(server, jpegs["coffee"], model="voc")
    assert {item["label"] for item in answer["classes"]} <= {*labels, "unlabelled"}


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (333, 77)])
@pytest.mark.parametrize("model", ["cut", "looks", "parts"])
def test_odd_sizes_are_answered_at_their_own(
    server: Running, model: str, size: tuple[int, int]
) -> None:
    image = encode(Image.new("RGB", size, "teal"), "PNG")
    labels = {"labels": ["a", "b"]} if model == "parts" else {}
    answer = segment(server, image, model=model, **labels)
    assert (answer["width"], answer["height"]) == size == png(answer["mask"]).size


# -- mmsegmentation's checkpoints --------------------------------------------------------------


@pytest.mark.parametrize("name", ["semantic_segmentation", "semantic_segmentation_convnext"])
def test_published_segmenters_answer_as_the_library(
    published: Running, name: str, jpegs: dict[str, bytes]
) -> None:
    model = load_checkpoint(GOLDENS / name / "checkpoint.pth")
    [own] = model.predict([jpegs["chelsea"]], output="mask")
    served = segment(published, jpegs["chelsea"], model=name, output="mask")
    assert (array(served["mask"]) == array(own["mask"])).mean() > 0.9999
    assert all(item["label"].startswith("class") for item in served["classes"])


def test_windows_ride_in_batches_and_take_places_beyond_a_full_queue(
    published: Running, photos: dict[str, Image.Image]
) -> None:
    name = "semantic_segmentation"
    wide = encode(photos["rocket"].resize((1000, 250)))
    before = published.metric("vitrail_batch_size_sum", trunk=name)
    batches = published.metric("vitrail_batch_size_count", trunk=name)
    answer = published.client.post(
        "/segment", files=[("image", ("wide", wide))] * QUEUE, data={"model": name}, timeout=120
    )
    results = answer.json()["results"]
    assert len(results) == QUEUE
    assert not [result for result in results if "error" in result]
    windows = published.metric("vitrail_batch_size_sum", trunk=name) - before
    batches = published.metric("vitrail_batch_size_count", trunk=name) - batches
    assert windows == 6 * QUEUE  # (256 - 64 + 42) // 43 + 1 of each
    assert batches < windows
    assert published.backend.batcher.depth()[name] == 0


@pytest.fixture(scope="module")
def huge(photos: dict[str, Image.Image]) -> bytes:
    return encode(photos["rocket"].resize((4000, 3000)))


@pytest.mark.parametrize("name", ["semantic_segmentation", "semantic_segmentation_convnext"])
def test_a_huge_photo_is_answered_at_its_own_size(
    published: Running, name: str, huge: bytes
) -> None:
    answer = segment(published, huge, model=name, output="rle")
    assert (answer["width"], answer["height"]) == (4000, 3000)
    assert sum(item["pixels"] for item in answer["classes"]) == 12_000_000


def test_a_segmenters_trunk_embeds_too(published: Running, jpegs: dict[str, bytes]) -> None:
    names = ["semantic_segmentation", "semantic_segmentation-embed"]
    answer = published.client.post(
        "/predict", files={"image": jpegs["coffee"]}, data={"models": names}
    )
    outputs = answer.json()["results"][0]["outputs"]
    assert len(outputs["semantic_segmentation-embed"]["embedding"]) == 32
    assert json.dumps(outputs)
