"""The fast transform in a server: what is decoded, what is answered, and what is reported."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import Registry
from models.errors import CatalogError
from models.inputs.images import DEFAULT_LIMITS, decode_image, decode_reduced
from models.trunks.base import Trunk
from service.decoding.pool import ThreadDecoder
from service.worker.execution_plan import TrunkPass, prepare_all
from tests.conftest import Running, encode, running

CATALOG = """
[trunks.fast]
source = "file:tiny.safetensors"
architecture = "test_vit"
transform = "fast"

[trunks.exact]
source = "file:tiny.safetensors"
architecture = "test_vit"

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

[models.boxed]
trunk = "boxed"
task = "classify"

[defaults]
classify = "exact"
"""
STARTUP = 'startup = ["fast", "exact"]\n'


@pytest.fixture(scope="module")
def catalog(tiny_catalog: Path) -> Path:
    path = tiny_catalog.parent / "fast.toml"
    path.write_text(STARTUP + CATALOG)
    return path


@pytest.fixture(scope="module")
def server(catalog: Path) -> Iterator[Running]:
    with running(catalog) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def large(photos: Mapping[str, Image.Image]) -> bytes:
    return encode(photos["coffee"].resize((2003, 1501)), quality=90)


@pytest.fixture
def trunks(catalog: Path) -> dict[str, Trunk]:
    registry = Registry.from_catalog(catalog, device="cpu")
    return {name: registry.get(name).trunk for name in ("fast", "exact")}


def prepare(data: bytes, *passes: TrunkPass) -> list[torch.Tensor]:
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

    passes = [TrunkPass("fast", trunks["fast"], Whole())]
    prepare_all(large, passes, DEFAULT_LIMITS, ThreadDecoder(DEFAULT_LIMITS))
    assert sizes == [(2003, 1501)]


def test_the_fast_transform_changes_digests_and_hardly_the_answer(
    server: Running, catalog: Path, large: bytes
) -> None:
    results = {}
    for name in ("fast", "exact"):
        described = server.client.get(f"/models/{name}").json()
        assert described["transform"] == name
        response = server.client.post(
            f"/classify?model={name}", content=large, headers={"Content-Type": "image/jpeg"}
        )
        results[name] = described | response.json()
    fast, exact = results["fast"], results["exact"]
    assert fast["preprocess_digest"] != exact["preprocess_digest"]
    assert fast["model_digest"] != exact["model_digest"]
    by_library = Registry.from_catalog(catalog, device="cpu").get("fast").predict([large])
    scores = [entry["score"] for entry in by_library[0]["predictions"]]
    served = [entry["score"] for entry in fast["results"][0]["predictions"]]
    assert scores == pytest.approx(served, abs=1e-6)
    assert scores == pytest.approx(
        [entry["score"] for entry in exact["results"][0]["predictions"]], abs=0.01
    )


def test_a_transform_that_a_trunk_cannot_use_keeps_it_from_loading(catalog: Path) -> None:
    with pytest.raises(CatalogError, match="the fast transform has no letterbox"):
        Registry.from_catalog(catalog, device="cpu").get("boxed")


def test_the_setting_holds_for_trunks_that_do_not_say(tiny_catalog: Path) -> None:
    registry = Registry.from_catalog(tiny_catalog, device="cpu", transform="fast")
    assert registry.get("tiny").trunk.min_side is not None
    with pytest.raises(CatalogError, match="unknown transform 'quick'"):
        Registry.from_catalog(tiny_catalog, device="cpu", transform="quick")
