"""The transforms `fast` and `gpu` in a server: what is decoded, what is answered and reported."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import Registry
from models.errors import CatalogError
from models.inputs.images import DEFAULT_LIMITS, decode_image, decode_reduced
from models.inputs.jpeg_file import JpegFile
from models.trunks import jpeg_batch
from models.trunks.base import Trunk
from service.decoding.pool import ThreadDecoder
from service.worker import request_run
from service.worker.execution_plan import TrunkPass, decode_all, prepare_all
from tests.conftest import Running, encode, running
from tests.models.test_gpu_transform import damaged, decode_jpegs

CATALOG = """
[trunks.fast]
source = "file:tiny.safetensors"
architecture = "test_vit"
transform = "fast"

[trunks.exact]
source = "file:tiny.safetensors"
architecture = "test_vit"

[trunks.gpu]
source = "file:tiny.safetensors"
architecture = "test_vit"
transform = "gpu"

[trunks.boxed]
source = "file:tiny.safetensors"
architecture = "test_vit"
transform = "fast"
preprocess = {crop_mode = "letterbox"}

[models.fast]
trunk = "fast"
task = "classify"

[models.exact]
trunk = "exact"
task = "classify"

[models.gpu]
trunk = "gpu"
task = "classify"

[models.boxed]
trunk = "boxed"
task = "classify"

[defaults]
classify = "exact"
"""
COUNTER = "vitrail_device_refused_files_total"
STARTUP = 'startup = ["fast", "exact", "gpu"]\n'


@pytest.fixture(scope="module")
def catalog(tiny_catalog: Path) -> Path:
    path = tiny_catalog.parent / "fast.toml"
    path.write_text(STARTUP + CATALOG)
    return path


class StandInDecoder:
    """A GPU's decoder, on the CPU."""

    def __init__(self) -> None:
        self.decoded = 0
        self.refused = b"none"
        self.before_refusal: Callable[[], None] = lambda: None

    def __call__(self, files: Sequence[bytes]) -> list[torch.Tensor]:
        if self.refused in files:
            self.before_refusal()
            raise RuntimeError("nvjpegDecode failed: 4")
        images = decode_jpegs(files)
        self.decoded += len(images)
        return images


@pytest.fixture(scope="module")
def on_device() -> Iterator[StandInDecoder]:
    decoder = StandInDecoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg_batch, "create_jpeg_decoder", lambda device: decoder)
        yield decoder


@pytest.fixture(scope="module")
def server(catalog: Path, on_device: StandInDecoder) -> Iterator[Running]:
    with running(catalog) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def large(photos: Mapping[str, Image.Image]) -> bytes:
    return encode(photos["coffee"].resize((2003, 1501)), quality=90)


@pytest.fixture
def trunks(catalog: Path, on_device: StandInDecoder) -> dict[str, Trunk]:
    registry = Registry.from_catalog(catalog, device="cpu")
    return {name: registry.get(name).trunk for name in ("fast", "exact", "gpu")}


def prepare(data: bytes, *passes: TrunkPass) -> list[Any]:
    prepared, size = prepare_all(data, passes, DEFAULT_LIMITS, ThreadDecoder(DEFAULT_LIMITS))
    assert size == (2003, 1501)
    return [pieces[0] for pieces in prepared]


def test_a_large_photo_is_decoded_at_a_reduced_size_for_fast_trunks_alone(
    trunks: dict[str, Trunk], large: bytes
) -> None:
    fast, exact = trunks["fast"], trunks["exact"]
    assert fast.min_side is not None
    reduced = decode_reduced(large, DEFAULT_LIMITS, fast.min_side)
    assert reduced.factor > 1
    alone = prepare(large, TrunkPass("fast", fast))[0]
    assert torch.equal(alone, fast.prepare(reduced))
    both = prepare(large, TrunkPass("fast", fast), TrunkPass("exact", exact))
    whole = decode_image(large)
    assert torch.equal(both[0], fast.prepare(whole))
    assert torch.equal(both[1], exact.prepare(whole))
    assert not torch.equal(alone, both[0])


def test_a_view_gets_the_whole_image(trunks: dict[str, Trunk], large: bytes) -> None:
    sizes = []

    class Whole:
        def cut(self, image: Image.Image) -> list[torch.Tensor]:
            sizes.append(image.size)
            return []

        def merge(self, rows: Any, size: tuple[int, int]) -> Mapping[str, np.ndarray]:
            raise NotImplementedError

    for name in ("fast", "gpu"):
        passes = [TrunkPass(name, trunks[name], Whole())]
        prepare_all(large, passes, DEFAULT_LIMITS, ThreadDecoder(DEFAULT_LIMITS))
    assert sizes == [(2003, 1501)] * 2


def test_a_file_waits_for_gpu_trunks_alone(trunks: dict[str, Trunk], large: bytes) -> None:
    gpu, exact = TrunkPass("gpu", trunks["gpu"]), TrunkPass("exact", trunks["exact"])
    [file] = prepare(large, gpu)
    assert isinstance(file, JpegFile)
    assert file.data is large
    decoded, file = prepare(large, exact, gpu)
    assert torch.equal(decoded, exact.trunk.prepare(decode_image(large)))
    assert isinstance(file, JpegFile)
    [decoded] = prepare(encode(decode_image(large), "PNG", compress_level=1), gpu)
    assert torch.equal(decoded, gpu.trunk.prepare(decode_image(large)))


def classify(server: Running, model: str, *images: bytes) -> list[Any]:
    files = [("image", ("image", image)) for image in images]
    response = server.client.post(f"/classify?model={model}", files=files)
    assert response.status_code == 200, response.text
    return list(response.json()["results"])


def scores(result: Any) -> list[float]:
    return [entry["score"] for entry in result["predictions"]]


def test_jpeg_files_are_decoded_by_the_device_and_others_by_the_cpu(
    server: Running, on_device: StandInDecoder, jpegs: dict[str, bytes]
) -> None:
    files = list(jpegs.values())
    images = [decode_image(data) for data in files]
    before = on_device.decoded
    by_device = classify(server, "gpu", *files)
    assert on_device.decoded == before + len(files)
    by_cpu = classify(server, "gpu", *(encode(image, "PNG") for image in images))
    progressive = encode(images[0], progressive=True, quality=95)
    assert scores(classify(server, "gpu", progressive)[0])
    assert on_device.decoded == before + len(files)
    for one, other, exact in zip(by_device, by_cpu, classify(server, "exact", *files), strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-6)
        assert scores(one) == pytest.approx(scores(exact), abs=0.01)


def test_a_damaged_file_fails_alone(
    server: Running, on_device: StandInDecoder, jpegs: dict[str, bytes]
) -> None:
    good = jpegs["coffee"]
    results = classify(server, "gpu", good, damaged(good), good)
    assert results[1]["error"]["status"] == 422
    assert "JPEG image cannot be decoded" in results[1]["error"]["detail"]
    for result in (results[0], results[2]):
        assert scores(result) == pytest.approx(scores(classify(server, "gpu", good)[0]), abs=1e-6)


def test_the_cpu_decodes_what_the_device_refuses(
    server: Running,
    on_device: StandInDecoder,
    jpegs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its client's turn, and also if others have taken all places meanwhile."""
    expected = classify(server, "gpu", jpegs["coffee"], jpegs["rocket"])
    before, counted = on_device.decoded, server.metric(COUNTER, trunk="gpu")
    backend = server.backend
    places = backend.batcher._scheduler.queues["gpu"].places
    turns = []

    def decode(*arguments: Any) -> Any:
        turns.append(backend._pipeline.admission.decoding.state()["decoding_inputs"])
        return decode_all(*arguments)

    monkeypatch.setattr(request_run, "decode_all", decode)
    monkeypatch.setattr(on_device, "refused", jpegs["coffee"])

    def take_all() -> None:
        if "other" not in places.interactive:
            places.extend("other", 2 * places.capacity, bulk=False)

    monkeypatch.setattr(on_device, "before_refusal", take_all)
    try:
        found = classify(server, "gpu", jpegs["coffee"], jpegs["rocket"])
    finally:
        places.give_back("other", 2 * places.capacity, bulk=False)
    assert on_device.decoded == before + 1
    assert [list(turn.values()) for turn in turns] == [[1]]
    assert server.metric(COUNTER, trunk="gpu") == counted + 1
    assert backend.batcher.depth()["gpu"] == 0  # places are given back
    for one, other in zip(expected, found, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-6)


@pytest.mark.parametrize("transform", ["fast", "gpu"])
def test_a_transform_changes_digests_and_hardly_the_answer(
    transform: str, server: Running, catalog: Path, large: bytes
) -> None:
    results = {}
    for name in (transform, "exact"):
        described = server.client.get(f"/models/{name}").json()
        assert described["transform"] == name
        response = server.client.post(
            f"/classify?model={name}", content=large, headers={"Content-Type": "image/jpeg"}
        )
        results[name] = described | response.json()
    changed, exact = results[transform], results["exact"]
    assert changed["preprocess_digest"] != exact["preprocess_digest"]
    assert changed["model_digest"] != exact["model_digest"]
    by_library = Registry.from_catalog(catalog, device="cpu").get(transform).predict([large])
    assert scores(by_library[0]) == pytest.approx(scores(changed["results"][0]), abs=1e-6)
    assert scores(by_library[0]) == pytest.approx(scores(exact["results"][0]), abs=0.01)


def test_a_transform_that_a_trunk_cannot_use_keeps_it_from_loading(catalog: Path) -> None:
    with pytest.raises(CatalogError, match="the fast transform has no letterbox"):
        Registry.from_catalog(catalog, device="cpu").get("boxed")


def test_the_setting_holds_for_trunks_that_do_not_say(tiny_catalog: Path) -> None:
    registry = Registry.from_catalog(tiny_catalog, device="cpu", transform="fast")
    assert registry.get("tiny").trunk.min_side is not None
    with pytest.raises(CatalogError, match="unknown transform 'quick'"):
        Registry.from_catalog(tiny_catalog, device="cpu", transform="quick")
