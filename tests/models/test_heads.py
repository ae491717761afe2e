import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools import mask as coco
from rasterio.features import rasterize
from shapely.geometry import shape

from models import Registry
from models.checkpoints.families.transformers.configuration import read_labels
from models.errors import CatalogError, InputError, TaskError
from models.heads.embed import Embed
from models.heads.ranking import best_classes
from models.inference import HeadCall, run_pass
from models.inputs.normalize import Normalize, collate
from models.inputs.transforms import preprocess_from_timm
from models.model import Model
from models.reference_outputs import Parts, reference_outputs
from models.segmentation.masks import encode_mask
from models.started_pass import StartedPass
from models.tasks.embed import encode_embedding
from models.tasks.labels import load_labels
from models.trunks.devices import Placement
from models.trunks.timm import TimmTrunk
from tests.conftest import encode


@pytest.fixture(scope="module")
def registry(tiny_catalog: Path) -> Registry:
    return Registry.from_catalog(tiny_catalog, device="cpu")


def vector(registry: Registry, name: str, image: Image.Image, **options: Any) -> np.ndarray:
    return np.array(registry.get(name).predict([image], **options)[0]["embedding"])


@pytest.mark.parametrize("classes", [5, 1000, 21_841])
@pytest.mark.parametrize("digits", [0, 2, 7])
def test_the_best_classes_are_those_of_a_stable_sort(classes: int, digits: int) -> None:
    """Few digits make many classes equal: the lower index then goes first."""
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(0)).round(
        decimals=digits
    )
    logits[1] *= 60  # most of its probabilities are 0
    logits[2, classes // 2] = -torch.inf
    scores = logits.softmax(-1).numpy()
    order = np.argsort(-scores, axis=-1, kind="stable")
    for count in (1, 5, classes):
        best = best_classes(logits, count)
        assert (best["index"].numpy() == order[:, :count]).all()
        assert (best["score"].numpy() == np.take_along_axis(scores, order[:, :count], -1)).all()


def test_logits_are_ranked_whatever_else_a_head_returns() -> None:
    started = StartedPass([[2], [2]])
    logits = torch.tensor([[0.0, 3, 1], [5, 0, 1]])
    started.add([(0, 0), (1, 0)], {"extra": torch.ones(2, 7), "logits": logits}, is_ranked=True)
    started.rank()
    rows = [row for [row] in started.results(started.tensors)]
    assert [row["index"].tolist() for row in rows] == [[1, 2], [0, 2]]  # type: ignore[index]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("the sizes do not fit"), InputError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RuntimeError),
        (RuntimeError("CUDA error: device-side assert triggered"), RuntimeError),
    ],
)
def test_a_devices_errors_are_not_blamed_on_the_images_size(
    error: Exception, told: type[Exception]
) -> None:
    def fail(parts: Parts, inputs: Any) -> Any:
        raise error

    trunk: Any = SimpleNamespace(preprocess=SimpleNamespace(input_size=(32, 32)), architecture="x")
    parts = Parts(trunk, {"embed": SimpleNamespace(reference_outputs=fail)}, "embed")
    with pytest.raises(told) as raised:
        reference_outputs(parts, {"pixel_values": torch.zeros(1, 3, 40, 40)})
    assert (raised.value is error) == (told is not InputError)


def test_scores_that_are_not_numbers_are_not_left_out() -> None:
    """Servers refuse them; an empty answer would hide them."""
    logits = torch.tensor([[0, torch.nan, 1], [0, torch.inf, 1], [0, 1, 2]])
    best = best_classes(logits, 2)
    assert best["score"].isnan().tolist() == [[True, True], [True, True], [False, False]]
    assert best["index"].tolist() == [[0, 1], [0, 1], [2, 1]]


def test_requests_for_different_numbers_of_classes_share_a_pass(
    registry: Registry, photos: dict[str, Image.Image]
) -> None:
    model = registry.get("tiny")
    head = model.heads["classify"]
    pixels = model.trunk.collate([model.trunk.prepare(photos["coffee"])] * 3)
    calls = [HeadCall.of(head, {"top_k": count}) for count in (2, 1000)]
    rows = run_pass(model.trunk, pixels, [calls[:1], calls[1:], [HeadCall(head), calls[0]]])
    two, everything, (raw, again) = rows[0][0], rows[1][0], rows[2]
    assert not any(isinstance(row, Exception) for row in (two, everything, raw, again))
    expected = model.predict([photos["coffee"]], top_k=2)[0]["predictions"]
    for row in (two, again):
        found = head.finish(row, (1, 1), top_k=2)
        assert found["index"].tolist() == [each["index"] for each in expected]
        assert found["label"].tolist() == [each["label"] for each in expected]
    assert sorted(everything["index"]) == list(range(1000))  # type: ignore[index]
    assert raw["logits"].shape == (1000,)  # type: ignore[index]


def test_probabilities_are_best_first_and_sum_to_one(
    registry: Registry, photos: dict[str, Image.Image]
) -> None:
    predictions = registry.get("tiny").predict([photos["coffee"]], top_k=1000)[0]["predictions"]
    scores = [p["score"] for p in predictions]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert sorted(p["index"] for p in predictions) == list(range(1000))
    assert len(registry.get("tiny").predict([photos["coffee"]])[0]["predictions"]) == 5


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "gem"])
def test_poolings_are_what_they_are_called(
    registry: Registry, photos: dict[str, Image.Image], pooling: str
) -> None:
    model = registry.get("tiny-embed")
    tokens = model.run(model.trunk.prepare(photos["rocket"]).unsqueeze(0))["tokens"][0]
    patches = tokens[1:]
    expected = {
        "cls": tokens[0],
        "mean": patches.mean(0),
        "max": patches.max(0).values,
        "gem": patches.clamp(min=1e-6).pow(3).mean(0).pow(1 / 3),
    }[pooling]
    ours = vector(registry, "tiny-embed", photos["rocket"], pooling=pooling, normalize=False)
    assert np.allclose(ours, expected, atol=1e-5)


def test_swins_channels_last_features_are_pooled_over_places(
    photos: dict[str, Image.Image],
) -> None:
    torch.manual_seed(0)
    network = timm.create_model("swin_tiny_patch4_window7_224").eval()
    trunk = TimmTrunk("swin", network, preprocess_from_timm(network), Placement())
    model = Model("swin", trunk, Embed(trunk))
    pixels = Normalize(trunk.preprocess)(collate([model.trunk.prepare(photos["rocket"])]))
    with torch.inference_mode():
        features = network.forward_features(pixels.contiguous())
    assert features.shape == (1, 7, 7, 768)
    for pooling, expected in (("mean", features.mean((1, 2))), ("max", features.amax((1, 2)))):
        entry = model.predict([photos["rocket"]], pooling=pooling, normalize=False)[0]
        assert np.allclose(entry["embedding"], expected[0], atol=1e-5)


def test_embeddings_have_unit_length_unless_told_otherwise(
    registry: Registry, photos: dict[str, Image.Image]
) -> None:
    plain = vector(registry, "conv", photos["chelsea"], task="embed", normalize=False)
    unit = vector(registry, "conv", photos["chelsea"], task="embed")
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-6)
    assert np.allclose(unit, plain / np.linalg.norm(plain), atol=1e-6)


def test_what_a_model_cannot_do_is_told(registry: Registry, photos: dict[str, Image.Image]) -> None:
    image = [photos["coffee"]]
    with pytest.raises(TaskError, match="does not do 'segment'; it does classify, embed"):
        registry.get("tiny").predict(image, task="segment")
    with pytest.raises(InputError, match="class token"):
        registry.get("conv").predict(image, task="embed", pooling="cls")
    with pytest.raises(InputError, match="ggem"):
        registry.get("tiny").predict(image, task="embed", pooling="ggem")
    with pytest.raises(InputError, match="less than or equal to 1000"):
        registry.get("tiny").predict(image, top_k=1001)
    with pytest.raises(InputError, match="No such file"):
        registry.get("tiny").predict(["nowhere.jpg"])


def test_bytes_paths_and_images_give_one_answer(
    registry: Registry, photos: dict[str, Image.Image], tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    photos["coffee"].save(path)
    answers = registry.get("tiny").predict(
        [path, str(path), encode(photos["coffee"], "PNG"), photos["coffee"]]
    )
    assert json.dumps(answers[0])
    assert answers[0]["predictions"][0]["label"] == answers[1]["predictions"][0]["label"]
    assert registry.get("tiny").predict([]) == []


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pillow_images_of_any_mode_are_taken(registry: Registry, mode: str) -> None:
    assert registry.get("tiny").predict([Image.new(mode, (20, 20))])


def test_a_batch_gives_what_single_images_give(
    registry: Registry, photos: dict[str, Image.Image]
) -> None:
    for name in ("tiny", "conv"):
        model = registry.get(name)
        together = model.predict(list(photos.values()), task="embed", normalize=False)
        for entry, photo in zip(together, photos.values(), strict=True):
            alone = model.predict([photo], task="embed", normalize=False)[0]
            assert np.allclose(entry["embedding"], alone["embedding"], atol=1e-5)


def test_labels_must_fit_the_classifier(tmp_path: Path, tiny_catalog: Path) -> None:
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace('"classify"', '"classify"\nlabels = ["a", "b"]', 1))
    with pytest.raises(CatalogError, match="2 labels for a classifier of 1000"):
        Registry.from_catalog(path, device="cpu").get("tiny")


def test_labels_come_from_a_file_beside_the_catalog(tmp_path: Path, tiny_catalog: Path) -> None:
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    path = tmp_path / "own.toml"
    path.write_text(text.replace('"classify"', '"classify"\nlabels = "names.txt"', 1))
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(1000)))
    model = Registry.from_catalog(path, device="cpu").get("tiny")
    best = model.predict([Image.new("RGB", (9, 9))])[0]["predictions"][0]
    assert best["label"] == f"class {best['index']}"


def test_labels_are_text_that_answers_can_hold(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"cat\nh\xfcnd\n")
    with pytest.raises(CatalogError, match="the file is not UTF-8"):
        load_labels("names.txt", tmp_path)
    config = {"id2label": {"0": "Hündin", "1": json.loads('"a\\ud800b"')}}
    assert read_labels(config) == ("Hündin", "a?b")


OF_TWO: dict[str, Any] = {"labels": ("background", "foreground"), "background": 0}
RING = np.zeros((20, 30), np.uint8)
RING[2:18, 3:25] = 1
RING[6:10, 8:15] = 0
RING[19, 29] = 1
DIAGONAL = np.eye(5, dtype=np.uint8)
MASKS = [
    RING,
    DIAGONAL,
    np.zeros((4, 7), np.uint8),
    np.ones((3, 2), np.uint8),
    np.ones((1, 1), np.uint8),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools.decode
@pytest.mark.parametrize("mask", MASKS)
def test_rle_is_cocos(mask: np.ndarray) -> None:
    encoded = json.loads(encode_mask(mask, "rle", [], **OF_TWO).tobytes())
    assert np.array_equal(coco.decode(encoded), mask)
    assert coco.area(encoded) == mask.sum()


@pytest.mark.parametrize("mask", MASKS)
def test_polygons_are_valid_keep_holes_and_draw_the_mask_again(mask: np.ndarray) -> None:
    polygons = json.loads(encode_mask(mask, "polygons", [], **OF_TWO).tobytes())
    geometries = [{"type": "Polygon", "coordinates": rings} for rings in polygons]
    assert all(shape(geometry).is_valid for geometry in geometries)
    assert sum(shape(geometry).area for geometry in geometries) == mask.sum()
    if geometries:
        assert np.array_equal(rasterize(geometries, out_shape=mask.shape), mask)
    assert not mask.any() or len(polygons) >= 1


def test_png_holds_indices_and_a_palette() -> None:
    png = encode_mask(RING, "png", [(0, 0, 0), (255, 0, 0)], **OF_TWO).tobytes()
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), RING)
    assert image.convert("RGB").getpixel((4, 3)) == (255, 0, 0)


def test_base64_is_little_endian_float32() -> None:
    values = np.array([1.5, -2.25], np.float32)
    text = encode_embedding(values, "base64")
    assert isinstance(text, str)
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == [1.5, -2.25]
    assert encode_embedding(values, "float") == [1.5, -2.25]
