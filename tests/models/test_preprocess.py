import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config

from models.errors import CatalogError
from models.inputs.transforms import (
    Normalize,
    Preprocess,
    collate,
    create_transform,
    preprocess_from_mapping,
    preprocess_from_timm,
)


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


def test_float_pixels_are_taken_as_normalised() -> None:
    pixels = torch.randn(1, 3, 8, 8)
    assert Normalize(Preprocess())(pixels) is pixels


def test_digest_tells_transforms_apart() -> None:
    assert Preprocess().digest == Preprocess().digest
    assert Preprocess().digest != Preprocess(crop_pct=0.9).digest


def test_a_setting_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(CatalogError, match="crop_percent"):
        preprocess_from_mapping({"crop_percent": 1})
    with pytest.raises(CatalogError, match="middle"):
        preprocess_from_mapping({"crop_mode": "middle"})
