import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config

from models.checkpoints.families.jax import TRUNCATED
from models.errors import CatalogError
from models.inputs.images import DEFAULT_LIMITS, decode_image, decode_reduced
from models.inputs.normalize import Normalize, collate
from models.inputs.transforms import (
    Preprocess,
    create_transform,
    preprocess_from_mapping,
    preprocess_from_timm,
    resolve_transform,
)
from tests.conftest import encode


def run(spec: Preprocess, *images: Image.Image) -> torch.Tensor:
    pixels = collate([create_transform(spec)(image) for image in images])
    normalised: torch.Tensor = Normalize(spec)(pixels)
    return normalised


# center 0.875 bicubic; center 0.9; squash; 0.95 with another mean; bilinear; center 1.0
ARCHITECTURES = (
    "tf_efficientnet_lite0",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_small_patch14_dinov2.lvd142m",
    "convnextv2_tiny.fcmae_ft_in22k_in1k",
    "test_vit",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_timms_evaluation_transform_exactly(
    name: str, photos: dict[str, Image.Image]
) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    theirs = timm_transform(**resolve_model_data_config(network), is_training=False)
    spec = preprocess_from_timm(network)
    images = [*photos.values(), photos["chelsea"].crop((0, 0, 37, 200)), Image.new("RGB", (1, 1))]
    ours = run(spec, *images)
    for row, image in zip(ours, images, strict=True):
        assert torch.equal(row, theirs(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_equals_timms_for_images_of_any_shape(mode: Any, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [(224, 224), (160, 96), (96, 160), (32, 32)]
    shapes = [(rows, columns) for rows in (7, 60, 333) for columns in (8, 75, 480)]
    for shape, size in itertools.product(shapes, sizes):
        if max(shape) > 8 * min(shape):
            continue  # cut before
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        spec = Preprocess(crop_mode=mode, input_size=size, interpolation=interpolation)
        theirs = timm_transform(
            (3, *size), interpolation=interpolation, crop_pct=0.875, crop_mode=mode, normalize=False
        )
        assert torch.equal(create_transform(spec)(image), theirs(image))


def test_border_mode_equals_timms(photos: dict[str, Image.Image]) -> None:
    spec = Preprocess(crop_mode="border", crop_pct=1.0, interpolation="bilinear")
    theirs = timm_transform(
        (3, 224, 224), crop_mode="border", crop_pct=1.0, interpolation="bilinear"
    )
    assert torch.equal(run(spec, photos["rocket"])[0], theirs(photos["rocket"]))


@pytest.mark.parametrize("mode", ["center", "squash", "border", "letterbox"])
@pytest.mark.parametrize("size", [(1, 5000), (16000, 1), (1, 1), (223, 225)])
def test_slivers_are_answered_in_bounded_memory(mode: str, size: tuple[int, int]) -> None:
    spec = preprocess_from_mapping({"crop_mode": mode})
    assert run(spec, Image.new("RGB", size, "white")).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("width", [400, 401])
def test_cutting_a_sliver_does_not_change_what_the_crop_sees(width: int) -> None:
    columns = np.random.default_rng(0).integers(0, 256, (4, width, 3), dtype=np.uint8)
    image = Image.fromarray(columns)
    theirs = timm_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
    ours = run(Preprocess(), image)[0]
    assert torch.allclose(ours, theirs(image), rtol=0, atol=2 / 255 / 0.224)


def test_letterbox_centres_the_whole_image_on_black() -> None:
    spec = Preprocess(crop_mode="letterbox", mean=(0, 0, 0), std=(1, 1, 1))
    tensor = run(spec, Image.new("RGB", (400, 200), "white"))[0]
    left, top, right, bottom = spec.content_box(400, 200) or (0, 0, 0, 0)
    assert (left, top, right, bottom) == (0, 56, 224, 168)
    assert tensor[:, top:bottom, left:right].min() == 1
    assert tensor.sum() == 3 * 112 * 224


@pytest.mark.parametrize("truncate", [False, True])
def test_without_antialias_it_is_tensorflows_resize(
    truncate: bool, photos: dict[str, Image.Image]
) -> None:
    """By torch's bilinear resize, which has the same four neighbours; rounded, or down."""
    spec = Preprocess(
        crop_mode="squash", crop_pct=1.0, interpolation="bilinear", antialias=False,
        input_size=(48, 64), truncate=truncate,
    )  # fmt: skip
    small = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))
    for image in (photos["chelsea"], small, Image.new("RGB", (1, 1), "red")):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(pixels, (48, 64), mode="bilinear")
        difference = resized[0] - create_transform(spec)(image)
        least, most = (0, 1) if truncate else (-0.5, 0.5)
        assert difference.min() > least - 1e-3
        assert difference.max() < most + 1e-3
    assert spec.digest != replace(spec, truncate=not truncate).digest
    assert spec.digest != replace(spec, antialias=True).digest
    for changed in ({"crop_mode": "center"}, {"interpolation": "bicubic"}, {"crop_pct": 0.9}):
        with pytest.raises(CatalogError, match="antialias = false needs"):
            create_transform(replace(spec, **changed))


def test_a_table_with_a_crop_or_an_interpolation_has_antialiasing() -> None:
    tables: list[dict[str, Any]] = [
        {"crop_pct": 0.9}, {"interpolation": "bicubic"}, {"crop_mode": "center", "crop_pct": 0.875},
    ]  # fmt: skip
    for table in tables:
        spec = preprocess_from_mapping(table, TRUNCATED)
        create_transform(spec)
        assert spec.antialias
        with pytest.raises(CatalogError, match="antialias = false needs"):
            create_transform(preprocess_from_mapping(table | {"antialias": False}, TRUNCATED))
    assert not preprocess_from_mapping({"input_size": [32, 32]}, TRUNCATED).antialias
    assert preprocess_from_mapping(TRUNCATED.settings) == TRUNCATED


def test_float_pixels_are_taken_as_normalised() -> None:
    pixels = torch.randn(1, 3, 8, 8)
    assert Normalize(Preprocess())(pixels) is pixels


def test_digest_tells_transforms_apart() -> None:
    assert Preprocess().digest == Preprocess().digest
    assert Preprocess().digest != Preprocess(crop_pct=0.9).digest


def test_the_exact_transform_leaves_digests_as_they_were() -> None:
    published = "sha256:7224b23360ea172c5efb1a7bdfdee67235de3de3487d4ccdc440a0d33bb9cb4d"
    assert Preprocess().digest == published
    assert "transform" not in Preprocess().settings
    assert replace(Preprocess(), transform="fast").digest != published


FAST_SPECS = (
    Preprocess(),
    Preprocess(crop_pct=1.0, interpolation="bilinear"),
    Preprocess(input_size=(96, 160)),
    Preprocess(input_size=(160, 96), crop_pct=0.9),
    Preprocess(crop_mode="squash", input_size=(96, 160), crop_pct=0.5),
    Preprocess(crop_mode="border", crop_pct=1.0),
    Preprocess(crop_mode="border"),
)


@pytest.mark.parametrize("spec", FAST_SPECS)
def test_the_fast_transform_equals_the_exact_one_for_whole_images(
    spec: Preprocess, photos: dict[str, Image.Image]
) -> None:
    exact, fast = (create_transform(replace(spec, transform=name)) for name in ("exact", "fast"))
    slivers = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 5000), (16000, 1), (7, 300))]
    for image in (*photos.values(), *slivers):
        assert torch.equal(exact(image), fast(image))


@pytest.mark.parametrize("spec", FAST_SPECS)
@pytest.mark.parametrize("size", [(2048, 1536), (1535, 2049), (11999, 1301)])
def test_the_fast_transform_of_a_reduced_photo_is_close(
    spec: Preprocess, size: tuple[int, int], photos: dict[str, Image.Image]
) -> None:
    spec = replace(spec, transform="fast")
    assert spec.min_side is not None
    data = encode(photos["coffee"].resize(size), quality=90)
    reduced = decode_reduced(data, DEFAULT_LIMITS, spec.min_side)
    assert reduced.image.width < reduced.size[0] == size[0]
    transform = create_transform(spec)
    difference = (transform(reduced).int() - transform(decode_image(data)).int()).abs()
    assert difference.float().mean() < 0.6
    assert difference.max() <= 20


def test_images_that_pillow_stores_in_blocks_are_taken() -> None:
    columns = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    with_blocks = Image.fromarray(columns)
    with pytest.raises(ValueError, match="contiguous"):
        pyarrow.array(with_blocks)
    theirs = timm_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, normalize=False)
    assert torch.equal(create_transform(Preprocess())(with_blocks), theirs(with_blocks))


def test_the_fast_transform_refuses_what_it_does_not_have() -> None:
    for spec in (Preprocess(crop_mode="letterbox"), Preprocess(interpolation="lanczos")):
        with pytest.raises(CatalogError, match="the fast transform has no"):
            create_transform(replace(spec, transform="fast"))
    with pytest.raises(CatalogError, match="quick"):
        resolve_transform("quick")


def test_a_setting_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(CatalogError, match="transform"):
        preprocess_from_mapping({"transform": "fast"})
    with pytest.raises(CatalogError, match="crop_percent"):
        preprocess_from_mapping({"crop_percent": 1})
    with pytest.raises(CatalogError, match="middle"):
        preprocess_from_mapping({"crop_mode": "middle"})
