"""Precisions: what computes in them, how far their outputs agree, and what is refused."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from PIL import Image

from models import Registry
from models.catalog import load_catalog
from models.checkpoints.store import Store
from models.errors import CatalogError, EngineError, ModelsError
from models.inputs.samples import sample_photos
from models.trunks.calibration import HOLD_OUT_EVERY, MAX_IMAGES, read_calibration
from models.trunks.devices import Placement
from models.trunks.engines import openvino as openvino_engine
from models.trunks.engines.quantization import has_attention
from models.trunks.features import LAST_OUTPUT, FeatureRequest, merge

CPU_HAS = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture
def photo_folder(tmp_path: Path, photos: dict[str, Image.Image]) -> Path:
    """16 crops of real photos as files, in a folder and a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, photo in photos.items():
        width, height = photo.size
        for number in range(4):
            cut = 20 * number
            crop = photo.crop((cut, cut, width - cut, height))
            crop.save(folder / ("more" if number % 2 else "") / f"{name}-{number}.jpg")
    return folder


@pytest.fixture
def registry_of(tiny_catalog: Path, tmp_path: Path) -> Callable[..., Registry]:
    """Registries of the tiny catalog with further settings of its trunk `tiny`."""

    def create(settings: str = "", **options: Any) -> Registry:
        text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
        path = tmp_path / "catalog.toml"
        path.write_text(text.replace("[trunks.tiny]", f"[trunks.tiny]\n{settings}"))
        store = Store(tmp_path / "store")
        return Registry(load_catalog(path), device="cpu", store=store, **options)

    return create


INT8 = 'precision = "int8"\ncalibration = "photos"'


@pytest.mark.parametrize(
    ("settings", "options", "error", "reason"),
    [
        ('precision = "fp8"', {}, EngineError, "eager does not compute in fp8"),
        ('precision = "fp8"\nengine = "auto"', {}, EngineError, "does not compute in fp8 on CPUs"),
        ('precision = "int8"', {}, EngineError, "eager does not compute in int8"),
        ('precision = "int8"\nengine = "auto"', {}, EngineError, "set calibration = 'FOLDER'"),
        (INT8, {"engine": "auto"}, CatalogError, "is not a folder"),
        ("", {"precision": "int8", "engine": "openvino"}, EngineError, "set calibration"),
    ],
)
def test_what_cannot_be_computed_fails_at_load_with_the_reason(
    registry_of: Callable[..., Registry],
    settings: str,
    options: dict[str, str],
    error: type[ModelsError],
    reason: str,
) -> None:
    registry = registry_of(settings, **options)
    with pytest.raises(error, match=reason):
        registry.get("tiny")
    assert reason in str(registry.describe("tiny").reason)


@pytest.mark.skipif("BF16" in CPU_HAS, reason="this CPU computes in bfloat16")
def test_a_cpu_without_bfloat16_is_named_as_the_reason(
    registry_of: Callable[..., Registry],
) -> None:
    with pytest.raises(
        EngineError, match=r"does not compute in bfloat16; openvino can use float32"
    ):
        registry_of(engine="openvino", precision="bfloat16").get("tiny")
    # `auto` computes in bfloat16 with eager instead
    registry = registry_of(engine="auto", precision="bfloat16")
    model = registry.get("tiny")
    assert next(model.trunk.network.parameters()).dtype == torch.bfloat16
    model.build()
    description = registry.describe("tiny")
    assert (description.engine, description.precision) == ("eager", "bfloat16")
    assert "does not compute in bfloat16" in str(description.engine_reason)


@pytest.mark.skipif("BF16" not in CPU_HAS, reason="this CPU does not compute in bfloat16")
def test_bfloat16_is_computed_by_the_compiled_model_alone(
    registry_of: Callable[..., Registry],
) -> None:
    registry = registry_of(engine="auto", precision="bfloat16")
    model = registry.get("tiny")
    model.build()
    assert next(model.trunk.network.parameters()).dtype == torch.float32
    description = registry.describe("tiny")
    assert (description.engine, description.precision) == ("openvino", "bfloat16")
    assert description.agreement is not None
    assert 0 < description.agreement["largest_error"] < 0.1


def test_eager_runs_a_float32_network_in_bfloat16_where_another_engine_needs_it_in_float32() -> (
    None
):
    """What `auto` runs while OpenVINO's pass is not built, or cannot be."""
    from models.trunks.engines.eager import Eager
    from tests.models.test_engines import small_trunk

    trunk = small_trunk()
    trunk.placement = Placement(precision="bfloat16")
    batch = trunk.collate(trunk.samples(2))
    features = Eager(trunk).run(LAST_OUTPUT.plan, (batch,))["features"]
    exact = small_trunk("eager").forward(batch).features
    assert features.dtype == torch.float32
    error = float((features - exact).abs().max() / exact.abs().max())
    assert 1e-5 < error < 0.1


def test_precision_is_in_the_digest_unless_it_is_float32(
    registry_of: Callable[..., Registry], photo_folder: Path
) -> None:
    def digest(settings: str = "", **options: str) -> str:
        return registry_of(settings, **options).get("tiny").digest

    plain = digest()
    assert digest(precision="float32") == digest(engine="openvino") == plain
    bfloat16 = digest('dtype = "bfloat16"')
    assert digest(precision="bfloat16") == bfloat16
    int8 = digest(INT8, engine="openvino")
    next(photo_folder.glob("*.jpg")).unlink()
    other = digest(INT8, engine="openvino")
    assert len({plain, bfloat16, int8, other}) == 4


def test_int8_is_calibrated_once_and_read_from_disk_afterwards(
    registry_of: Callable[..., Registry], photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registry_of(INT8, engine="auto")
    model = first.get("tiny")
    model.build()
    description = first.describe("tiny")
    assert (description.engine, description.precision) == ("openvino", "int8")
    agreement = description.agreement
    assert agreement is not None
    held_out = len(read_calibration(photo_folder).held_out)
    assert agreement["inputs"] == openvino_engine.SAMPLES + held_out == 10
    assert 1e-4 < agreement["largest_error"] < 1
    assert 0 <= agreement["top1_agreement"] <= 1
    assert description.memory_bytes is not None
    assert description.memory_bytes > model.trunk_bytes + model.head_bytes
    [photo] = sample_photos(1)
    expected = model.predict([photo])

    monkeypatch.setattr(subprocess, "run", None)
    second = registry_of(INT8, engine="openvino")
    again = second.get("tiny")
    again.build()
    assert again.predict([photo]) == expected
    assert again.digest == model.digest


def test_passes_that_int8_does_not_have_run_eagerly_under_auto(
    registry_of: Callable[..., Registry], photo_folder: Path
) -> None:
    trunk = registry_of(INT8, engine="auto").get("tiny").trunk
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
    queries = trunk.add_queries(torch.randn(depth, 2, dim))
    request = merge([(FeatureRequest(queries=queries), range(2))])
    with pytest.raises(EngineError, match="query tokens have no calibration images"):
        trunk.build(request)
    output = trunk.forward(trunk.collate(trunk.samples(2)), request)
    assert output.queries[queries].shape[2] == 2


def test_a_tolerance_is_a_limit_in_any_precision(
    registry_of: Callable[..., Registry], photo_folder: Path
) -> None:
    strict = registry_of(f"{INT8}\ntolerance = 1e-6", engine="auto").get("tiny")
    with pytest.raises(
        EngineError, match=r"differ from eager float32 by .* the tolerance is 1e-06"
    ):
        strict.build()
    model = registry_of("tolerance = 1e-12", engine="openvino").get("tiny")
    with pytest.raises(EngineError, match="the tolerance is 1e-12"):
        model.build()


def test_a_calibration_set_is_an_even_selection_with_some_held_out(
    photo_folder: Path, tmp_path: Path
) -> None:
    images = read_calibration(photo_folder)
    assert len(images.files) == 16
    assert len(images.held_out) == 16 // HOLD_OUT_EVERY
    assert set(images.held_out).isdisjoint(images.calibration)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(2 * MAX_IMAGES):
        (many / f"{number:04}.png").write_bytes(b"%d" % number)
    chosen = read_calibration(many).files
    assert [path.stem for path in chosen[:2]] == ["0000", "0002"]
    assert len(chosen) == MAX_IMAGES
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CatalogError, match="no image in"):
        read_calibration(empty)


def test_a_damaged_calibration_image_is_named(
    registry_of: Callable[..., Registry], photo_folder: Path
) -> None:
    (photo_folder / "damaged.jpg").write_bytes(b"no image")
    model = registry_of(INT8, engine="auto").get("tiny")
    with pytest.raises(ModelsError, match=r"damaged\.jpg: not an image"):
        model.build()


@pytest.mark.weights
def test_real_weights_in_int8_agree_with_float32_on_most_photos(
    demo: Registry, photos: dict[str, Image.Image], photo_folder: Path, tmp_path: Path
) -> None:
    catalog = demo.catalog
    name = "efficientnet-lite0"
    text = f"""
[trunks.{name}]
source = "{catalog.trunks[name].source}"
engine = "openvino"
precision = "int8"
calibration = "photos"
[models.{name}]
trunk = "{name}"
task = "classify"
"""
    path = tmp_path / "catalog.toml"
    path.write_text(text)
    model = Registry.from_catalog(path, device="cpu", store=demo.store).get(name)
    assert not has_attention(model.trunk.network)
    best = [
        [model.predict([photo], top_k=1)[0]["predictions"][0]["index"] for photo in photos.values()]
        for model in (demo.get(name), model)
    ]
    agreeing = sum(a == b for a, b in zip(*best, strict=True))
    assert agreeing >= 3
    agreement = model.trunk.engine.report().agreement
    assert agreement is not None
    assert agreement.top1_agreement is not None
    assert agreement.top1_agreement >= 0.5
