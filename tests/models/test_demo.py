"""The demo's real weights on real photos, against their references."""

import base64
import io
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from models import Registry
from models.checkpoints.sources import fetch, parse_source
from models.checkpoints.store import Store
from models.errors import InputError
from models.inputs.normalize import Normalize
from models.trunks.timm import TimmTrunk

SIZE = 224


def test_the_cat_and_the_espresso_are_named(demo: Registry, photos: dict[str, Image.Image]) -> None:
    model = demo.get("efficientnet-lite0")
    cat, coffee = model.predict([photos["chelsea"], photos["coffee"]], top_k=3)
    cats = {"tabby, tabby cat", "tiger cat", "Egyptian cat"}
    assert {p["label"] for p in cat["predictions"]} & cats
    assert coffee["predictions"][0]["label"] == "espresso"


def test_logits_equal_timms(demo: Registry, photos: dict[str, Image.Image]) -> None:
    trunk_entry = demo.catalog.trunks["efficientnet-lite0"]
    path = fetch(parse_source(trunk_entry.source), Store(), Path())
    network = timm.create_model("tf_efficientnet_lite0").eval()
    theirs = torch.load(path, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), theirs.values(), strict=True)))
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    model = demo.get("efficientnet-lite0")
    for photo in photos.values():
        with torch.inference_mode():
            expected = network(transform(photo).unsqueeze(0))
        ours = model.run(model.trunk.prepare(photo).unsqueeze(0))["logits"]
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def onnx_model(demo: Registry) -> onnxruntime.InferenceSession:
    path = fetch(parse_source(demo.catalog.trunks["dinov2-focus"].source), Store(), Path())
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def original_pixels(photo: Image.Image) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The package's own preprocessing: albumentations' LongestMaxSize (INTER_AREA), centred
    PadIfNeeded on black, Normalize; and where the photo lies."""
    scale = SIZE / max(photo.size)
    width, height = (round(side * scale) for side in photo.size)
    resized = cv2.resize(np.asarray(photo), (width, height), interpolation=cv2.INTER_AREA)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
    canvas[top : top + height, left : left + width] = resized
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((canvas / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
    return pixels, (left, top, left + width, top + height)


def test_saliency_equals_the_onnx_models_on_equal_pixels(
    demo: Registry, photos: dict[str, Image.Image], onnx_model: onnxruntime.InferenceSession
) -> None:
    model = demo.get("dinov2-focus")
    for photo in photos.values():
        pixels = Normalize(model.trunk.preprocess)(model.trunk.prepare(photo)[None]).contiguous()
        ours = model.run(pixels)["saliency"].numpy()
        theirs = onnx_model.run(None, {"input_image": pixels.numpy()})[0][:, 0]
        assert np.abs(ours - theirs).max() < 2e-5


def test_saliency_and_masks_follow_the_original_package_end_to_end(
    demo: Registry, photos: dict[str, Image.Image], onnx_model: onnxruntime.InferenceSession
) -> None:
    """Pixels are equal, so the maps are; only the resize of the map to the photo's size, Pillow's
    here and OpenCV's there, can move a mask's edge."""
    model = demo.get("dinov2-focus")
    overlaps = []
    for photo in photos.values():
        pixels, box = original_pixels(photo)
        spec = model.trunk.preprocess
        assert spec.content_box(*photo.size) == box
        ours_pixels = Normalize(spec)(model.trunk.prepare(photo)[None])
        assert np.abs(ours_pixels.numpy() - pixels).max() < 1e-6
        theirs = onnx_model.run(None, {"input_image": pixels})[0][0, 0]
        ours = model.run(ours_pixels)["saliency"][0].numpy()
        assert np.abs(ours - theirs).max() < 2e-5
        left, top, right, bottom = box
        heatmap = cv2.resize(theirs[top:bottom, left:right], photo.size) > 0.5
        mask_png = base64.b64decode(model.predict([photo])[0]["mask"])
        mask = np.asarray(Image.open(io.BytesIO(mask_png))) > 0
        overlaps.append((mask & heatmap).sum() / (mask | heatmap).sum())
    assert np.mean(overlaps) > 0.995


def test_the_foreground_is_the_subject(demo: Registry, photos: dict[str, Image.Image]) -> None:
    entry = demo.get("dinov2-focus").predict([photos["rocket"]])[0]
    assert (entry["width"], entry["height"]) == photos["rocket"].size
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["mask"]))))
    assert mask.shape == (entry["height"], entry["width"])
    pixels = {c["label"]: c["pixels"] for c in entry["classes"]}
    assert pixels == {"background": int((mask == 0).sum()), "foreground": int(mask.sum())}
    # the rocket stands a little right of the middle; sky is left and right
    assert mask[150:380, 310:335].mean() > 0.7
    assert mask[:, :150].mean() < 0.05
    assert mask[:, -150:].mean() < 0.05


def test_labels_are_for_text_prompted_models(
    demo: Registry, photos: dict[str, Image.Image]
) -> None:
    with pytest.raises(InputError, match="not prompted"):
        demo.get("dinov2-focus").predict([photos["coffee"]], labels=["cup"])


@pytest.mark.parametrize("name", ["efficientnet-lite0-embed", "dinov2-focus-embed"])
def test_a_crop_and_a_recompressed_copy_rank_above_other_photos(
    demo: Registry, photos: dict[str, Image.Image], name: str
) -> None:
    model = demo.get(name)
    vectors = {n: np.array(e["embedding"]) for n, e in zip(
        photos, model.predict(list(photos.values())), strict=True)}  # fmt: skip
    for wanted, photo in photos.items():
        width, height = photo.size
        crop = photo.crop((width // 10, height // 10, width * 9 // 10, height * 9 // 10))
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=30)
        for query in (crop, buffer.getvalue()):
            vector = np.array(model.predict([query])[0]["embedding"])
            assert max(vectors, key=lambda n: float(vector @ vectors[n])) == wanted


def test_the_stored_form_gives_what_the_wheel_gave(demo: Registry) -> None:
    from models.checkpoints.loading import build_trunk, read_checkpoint
    from models.trunks.devices import Placement

    path = fetch(parse_source(demo.catalog.trunks["dinov2-focus"].source), Store(), Path())
    direct = build_trunk(read_checkpoint(path, {}), Placement())
    trunk = demo.get("dinov2-focus").trunk
    assert isinstance(trunk, TimmTrunk)
    assert direct.digest == trunk.digest


def test_the_shipped_head_stands_on_the_demos_trunk(demo: Registry) -> None:
    """The same object in memory, and made for these very weights."""
    model = demo.get("stamps")
    assert model.about["kind"] == "vqt"
    assert len(model.heads["classify"].labels) == 24
    assert model.trunk is demo.get("dinov2-focus").trunk
    held = model.about["training"]["holdout_accuracy"]
    assert 0.5 < held < 1
