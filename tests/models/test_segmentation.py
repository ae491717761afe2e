"""Segmentation: decoders, windows, masks of an image's own size, and foregrounds nobody trained."""

import base64
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from rasterio.features import rasterize, shapes
from shapely.geometry import shape
from torch.nn.functional import interpolate

from models import Registry
from models.catalog import load_catalog
from models.checkpoints.checkpoint import HeadState
from models.checkpoints.families.configuration import read_configuration
from models.checkpoints.store import Store
from models.errors import CatalogError, CheckpointError, InputError
from models.heads.dense import LONGEST, WholePatches
from models.heads.foreground import AttentionMask, cut
from models.heads.registry import create_head
from models.heads.segment import foreground_mask, reduced
from models.heads.semantic import Semantic
from models.inference import HeadCall, run_rows
from models.inputs.normalize import Normalize
from models.model import Model
from models.segmentation import polygons
from models.segmentation.decoders import create_decoder
from models.segmentation.label_sets import label_sets, load_label_set, palette_of
from models.segmentation.masks import encode_mask, without_specks
from models.segmentation.polygons import count_vertices, polygons_by_class
from models.segmentation.resample import UNLABELLED, label_map
from models.segmentation.windows import Windows
from models.tasks.labels import load_labels
from models.tasks.table import get_task
from models.trunks.features import merge
from tests.conftest import wait_until
from tests.models.test_fixtures import fixture

RANDOM = np.random.default_rng(0)


def upsampled(logits_Khw: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    return interpolate(
        torch.from_numpy(logits_Khw)[None], size=size[::-1], mode="bilinear", align_corners=False
    )[0]


# -- masks of an image's own size --------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "cells", "size"),
    [
        (5, (7, 9), (200, 131)),
        (150, (32, 20), (333, 512)),
        (3, (40, 40), (17, 23)),
        (300, (4, 4), (130, 70)),
        (2, (1, 1), (5, 3)),
        (4, (1, 6), (1, 100)),
        (4, (6, 1), (5000, 1)),
        (7, (5, 5), (1, 1)),
    ],
)
def test_the_best_class_is_that_of_the_resized_logits(
    classes: int, cells: tuple[int, int], size: tuple[int, int]
) -> None:
    logits = RANDOM.normal(size=(classes, *cells)).astype(np.float32)
    found = label_map(logits, (0, 0, *size), size)
    assert found.shape == size[::-1]
    full = upsampled(logits, size)
    best, chosen = (
        full.max(0).values,
        full.gather(0, torch.from_numpy(found.astype(np.int64))[None]),
    )
    assert torch.allclose(best, chosen[0], atol=1e-5)  # but for ties
    assert (full.argmax(0).numpy() == found).mean() > 0.999


def test_classes_that_are_not_likely_enough_are_left_out() -> None:
    logits = RANDOM.normal(size=(6, 8, 8)).astype(np.float32) * 2
    probability = upsampled(logits, (90, 70)).softmax(0).max(0).values.numpy()
    found = label_map(logits, (0, 0, 90, 70), (90, 70), 0.5)
    unsure = np.abs(probability - 0.5) < 1e-4
    np.testing.assert_array_equal((found == UNLABELLED)[~unsure], (probability < 0.5)[~unsure])
    shares = torch.from_numpy(logits).softmax(0).numpy()
    kept = label_map(shares, (0, 0, 90, 70), (90, 70), 0.5, softmax=False)
    best = upsampled(shares, (90, 70)).max(0).values.numpy()
    unsure = np.abs(best - 0.5) < 1e-4
    np.testing.assert_array_equal((kept == UNLABELLED)[~unsure], (best < 0.5)[~unsure])


def test_beyond_what_the_map_shows_nothing_is_known() -> None:
    logits = RANDOM.normal(size=(3, 4, 4)).astype(np.float32)
    found = label_map(logits, (10, 5, 50, 45), (60, 50))
    inside = np.zeros((50, 60), bool)
    inside[5:45, 10:50] = True
    assert (found[~inside] == UNLABELLED).all()
    np.testing.assert_array_equal(
        found[inside], label_map(logits, (0, 0, 40, 40), (40, 40)).ravel()
    )


def test_a_large_photo_of_many_classes_takes_bounded_memory() -> None:
    coarse = RANDOM.normal(size=(150, 12, 16)).astype(np.float32)
    logits = np.stack([cv2.resize(each, (683, 512)) for each in coarse])
    tracemalloc.start()
    mask = label_map(logits, (0, 0, 4000, 3000), (4000, 3000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mask.shape == (3000, 4000)
    assert peak < 100e6  # resized whole, the logits would take 7.2 GB


def test_a_foreground_is_what_is_above_the_threshold() -> None:
    saliency = RANDOM.random((9, 7)).astype(np.float32)
    full = upsampled(saliency[None], (50, 80))[0].numpy()
    for threshold in (0.0, 0.3, 1.0):
        found = foreground_mask(saliency, (0, 0, 50, 80), (50, 80), threshold)
        sure = np.abs(full - threshold) > 1e-5
        np.testing.assert_array_equal(found[sure], (full > threshold)[sure])


def test_logits_are_halved_until_an_answer_can_hold_them() -> None:
    logits = RANDOM.normal(size=(150, 512, 680)).astype(np.float32)
    small = reduced(logits)
    assert small.shape == (150, 128, 170)
    np.testing.assert_allclose(small[7, 0, 0], logits[7, :4, :4].mean(), atol=1e-5)
    assert reduced(small) is small


def test_small_regions_can_be_left_out() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[2:8, 2:8], mask[15, 15], mask[10:12, 10:12] = 1, 1, 2
    cleaned = without_specks(mask, 5, 0)
    assert (cleaned == 1).sum() == 36
    assert not (cleaned == 2).any()
    np.testing.assert_array_equal(without_specks(mask, 1, 0), mask)


# -- forms -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools.decode
def test_masks_of_many_classes_survive_every_form() -> None:
    labels = [f"class {i}" for i in range(150)]
    mask = RANDOM.choice([0, 3, 149, UNLABELLED], (30, 40)).astype(np.uint8)
    mask[5:20, 5:30] = 3
    options: dict[str, Any] = {"labels": labels, "background": UNLABELLED}
    by_class = json.loads(encode_mask(mask, "rle", [], **options).tobytes())
    assert [item["index"] for item in by_class] == [0, 3, 149]
    for item in by_class:
        assert item["label"] == labels[item["index"]]
        np.testing.assert_array_equal(coco.decode(item["rle"]), mask == item["index"])
    for item in json.loads(encode_mask(mask, "polygons", [], **options).tobytes()):
        outlines = [{"type": "Polygon", "coordinates": rings} for rings in item["polygons"]]
        assert all(shape(outline).is_valid for outline in outlines)
        np.testing.assert_array_equal(
            rasterize(outlines, out_shape=mask.shape), mask == item["index"]
        )
    palette = palette_of(labels)
    png = Image.open(io.BytesIO(encode_mask(mask, "png", palette, **options).tobytes()))
    np.testing.assert_array_equal(np.asarray(png), mask)
    colours = np.asarray(png.convert("RGB"))
    assert colours[10, 10].tolist() == list(palette[3])
    photo = Image.new("RGB", (40, 30), "white")
    overlay = encode_mask(mask, "overlay", palette, image=photo, **options)
    assert Image.open(io.BytesIO(overlay.tobytes())).size == (40, 30)
    with pytest.raises(InputError, match="255 classes"):
        encode_mask(mask.astype(np.uint16), "png", palette, **options)


def test_an_overlay_takes_little_more_than_its_pixels() -> None:
    mask = np.full((1000, 1000), 1, np.uint8)
    photo = Image.new("RGB", (1000, 1000), "white")
    options: dict[str, Any] = {"labels": ["a", "b"], "background": 0, "image": photo}
    tracemalloc.start()
    try:
        overlay = encode_mask(mask, "overlay", [[0, 0, 0], [200, 100, 0]], **options)
        assert tracemalloc.get_traced_memory()[1] < 4 * mask.size * 3
    finally:
        tracemalloc.stop()
    pixels = np.asarray(Image.open(io.BytesIO(overlay.tobytes())))
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[224, 169, 114]]


def test_the_polygons_of_all_classes_are_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        return shapes(*arguments, **options)

    monkeypatch.setattr("models.segmentation.polygons.shapes", counted)
    mask = np.arange(100, dtype=np.uint8).repeat(4).reshape(20, 20)
    options: dict[str, Any] = {"labels": ["a"] * 100, "background": UNLABELLED}
    by_class = json.loads(encode_mask(mask, "polygons", [], **options).tobytes())
    assert [item["index"] for item in by_class] == list(range(100))
    assert len(passes) == 1


@pytest.mark.parametrize("bound", ["LARGE_PIXELS", "MANY_VERTICES"])
def test_the_polygons_of_a_large_mask_are_found_in_another_process(
    monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """GDAL would keep all other threads of this one waiting."""
    mask = np.random.default_rng(0).choice([0, 3, UNLABELLED], (30, 40)).astype(np.uint8)
    here = polygons_by_class(mask, UNLABELLED)
    monkeypatch.setattr(polygons, "shapes", lambda *_, **__: pytest.fail("found here"))
    monkeypatch.setattr(polygons, bound, 1)
    assert polygons_by_class(mask, UNLABELLED) == here
    turned = np.tile(mask, 2)[::-1, ::2].astype(np.uint16)
    assert polygons_by_class(turned, 3).keys() == {0, UNLABELLED}


@contextmanager
def killing(most: int) -> Iterator[None]:
    """A context in which up to so many processes are killed that find polygons for this one."""
    killed: set[int] = set()
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.01) and len(killed) < most:
            for children in Path("/proc/self/task").glob("*/children"):
                for pid in set(map(int, children.read_text().split())) - killed:
                    if b"polygons" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(kill)
        try:
            yield
        finally:
            stop.set()


def test_a_process_that_dies_is_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.eye(9, dtype=np.uint8)
    here = polygons_by_class(mask, 0)
    monkeypatch.setattr(polygons, "LARGE_PIXELS", 0)
    with killing(1):
        assert polygons_by_class(mask, 0) == here
    with killing(2), pytest.raises(InputError, match="too much time or memory"):
        polygons_by_class(mask, 0)


def test_a_process_for_polygons_is_limited_and_ends_with_its_parent() -> None:
    command = [sys.executable, "-m", "models.segmentation.polygons", "9", "9", "|u1", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        unlimited = resource.RLIM_INFINITY
        wait_until(lambda: resource.prlimit(process.pid, resource.RLIMIT_AS)[0] != unlimited)
        assert resource.prlimit(process.pid, resource.RLIMIT_CPU)[0] == polygons.MAX_CPU_S
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 1


def test_rings_are_parsed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is, no other thread runs."""
    parsed: list[str] = []

    def loads(text: str) -> Any:
        parsed.append(text)
        return json.JSONDecoder().decode(text)

    mask = np.random.default_rng(0).choice([0, 1, 2], (30, 40)).astype(np.uint8)
    size = {"size": np.array([40, 30]), **dict.fromkeys(("index", "label", "pixels"), np.array([]))}
    for of_mask, labels in (
        (mask, ["a", 'b"\\\n[[1.0]]', "c"]),
        (mask % 2, ["no", "yes"]),
        (mask * 0, ["no", "yes"]),
    ):
        options: dict[str, Any] = {"labels": labels, "background": 0}
        encoded = encode_mask(of_mask, "polygons", [], **options)
        expected = json.loads(encoded.tobytes())
        with monkeypatch.context() as patched:
            patched.setattr(json, "loads", loads)
            assert get_task("segment").render({**size, "polygons": encoded})["mask"] == expected
    assert len(parsed) > 300
    assert max(map(len, parsed)) < 5000


def test_vertices_are_counted_before_polygons_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a noisy mask of 4 million pixels took 0.8 GiB, and the answer 58 MB."""
    noise = np.pad(
        np.random.default_rng(0).integers(0, 9, (600, 70)).astype(np.uint8), 1
    )  # more than ROWS
    found = [json.loads(text) for text in polygons_by_class(noise, UNLABELLED).values()]
    outlines = [ring for polygons in found for rings in polygons for ring in rings]
    around = 4  # the mask's own corners
    assert count_vertices(noise) + around == sum(len(ring) - 1 for ring in outlines)
    monkeypatch.setattr(polygons, "MAX_VERTICES", count_vertices(noise) - 1)
    monkeypatch.setattr(polygons, "shapes", lambda *_, **__: pytest.fail("found all the same"))
    with pytest.raises(InputError, match=r"vertices.*min_area"):
        polygons_by_class(noise, 0)


def test_label_sets_have_a_colour_for_each_name() -> None:
    sizes = {"ade20k-150": 150, "cityscapes-19": 19, "voc-21": 21}
    assert label_sets() == sorted(sizes)
    for name, size in sizes.items():
        labels, palette = load_label_set(name)
        assert len(labels) == len(palette) == size
        assert palette_of(labels) == palette
        assert load_labels(name, Path()) == labels
    assert load_label_set("voc-21")[1][1] == [128, 0, 0]
    own = palette_of([f"mine {i}" for i in range(250)])
    assert len({tuple(colour) for colour in own}) == 250


# -- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (110, 92), (65, 64), (200, 64), (64, 127)])
def test_windows_are_mmsegmentations(size: tuple[int, int]) -> None:
    """They cover everything, keep their size, and the last ones are shifted back inside."""
    windows = Windows(scale=(2048, 64), crop=(64, 64), stride=(43, 43))
    boxes = windows.boxes(*size)
    covered = np.zeros(size[::-1], int)
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (64, 64)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    counts = [max(n - 64 + 42, 0) // 43 + 1 for n in size]
    assert len(boxes) == counts[0] * counts[1]


def test_pieces_put_together_are_the_whole_by_windows() -> None:
    """What a server does with an image's pieces is what the reference does with the whole."""
    model, _, _ = fixture("semantic_segmentation")
    head = model.heads["segment"]
    assert isinstance(head, Semantic)
    photo = Image.fromarray(RANDOM.integers(0, 255, (92, 110, 3), np.uint8))
    view = Windows(scale=(110, 92), crop=(64, 64), stride=(43, 43))
    trunk, call = model.trunk, HeadCall(head)
    rows = [run_rows(trunk, trunk.collate([piece]), call)[0] for piece in view.cut(photo)]
    assert len(rows) == 6
    merged = view.merge(rows, photo.size)["logits"]
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    whole = model.run(Normalize(model.trunk.preprocess)(pixels))
    np.testing.assert_allclose(merged, whole["mask_logits"][0], atol=1e-4)


def test_one_window_is_the_whole_image() -> None:
    model, golden, _ = fixture("semantic_segmentation")
    head: Any = model.heads["segment"]
    pixels = golden["pixel_values"][:1]
    row = {"logits": head._logits(pixels)[0].numpy()}
    merged = head.view.merge([row], (64, 64))["logits"]
    np.testing.assert_allclose(merged, golden["mask_logits"][0], atol=1e-4)


@pytest.mark.parametrize("name", ["semantic_segmentation", "semantic_segmentation_convnext"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (37, 53), (640, 480)])
def test_images_of_any_size_are_answered_at_their_own(name: str, size: tuple[int, int]) -> None:
    model, _, _ = fixture(name)
    photo = Image.fromarray(RANDOM.integers(0, 255, (*size[::-1], 3), np.uint8))
    [answer] = model.predict([photo])
    assert (answer["width"], answer["height"]) == size
    assert sum(item["pixels"] for item in answer["classes"]) == size[0] * size[1]
    assert Image.open(io.BytesIO(base64.b64decode(answer["mask"]))).size == size


# -- decoders ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_catalog: Path) -> Model:
    store = Store(tiny_catalog.parent / "store")
    return Registry.from_catalog(tiny_catalog, device="cpu", store=store).get("tiny")


def linear_state(width: int, settings: dict[str, Any]) -> HeadState:
    weights = {
        "decode_head.bn.weight": torch.rand(width) + 0.5,
        "decode_head.bn.bias": torch.randn(width),
        "decode_head.bn.running_mean": torch.randn(width),
        "decode_head.bn.running_var": torch.rand(width) + 0.5,
        "decode_head.bn.num_batches_tracked": torch.tensor(1),
        "decode_head.conv_seg.weight": torch.randn(4, width, 1, 1),
        "decode_head.conv_seg.bias": torch.randn(4),
    }
    return HeadState(weights, settings)


@pytest.mark.parametrize("layers", [[-1], [-4, -3, -2, -1]])
def test_linear_heads_read_one_layer_or_several(tiny: Model, layers: list[int]) -> None:
    """DINOv2's: the patch tokens of some blocks beside each other, a batch norm, a linear layer."""
    network: Any = tiny.trunk.network
    inputs = [network.embed_dim] * len(layers)
    state = linear_state(sum(inputs), {"layers": layers, "normed": True, "inputs": inputs})
    head = create_head("semantic", tiny.trunk, ("a", "b", "c", "d"), state)
    pixels = torch.randn(2, 3, *tiny.trunk.preprocess.input_size)
    with torch.inference_mode():
        request = merge([(head.request, [0, 1])])
        found = head.forward(tiny.trunk.forward(pixels, request))["logits"]
        taken = network.get_intermediate_layers(
            pixels, n=[n % len(network.blocks) for n in layers], norm=True
        )
        tokens = torch.cat(list(taken), -1)
        weights = {k.removeprefix("decode_head."): v for k, v in state.tensors.items()}
        scale = weights["bn.weight"] / (weights["bn.running_var"] + 1e-5).sqrt()
        normed = (tokens - weights["bn.running_mean"]) * scale + weights["bn.bias"]
        logits = normed @ weights["conv_seg.weight"][:, :, 0, 0].T + weights["conv_seg.bias"]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), logits, atol=1e-4, rtol=0)


def test_semantic_fpn_sums_levels_brought_to_the_finest() -> None:
    dims, width, channels = [8, 16, 32, 64], 12, 10
    names: dict[str, torch.Tensor] = {"decode_head.conv_seg.weight": torch.randn(5, channels, 1, 1)}
    names["decode_head.scale_heads.0.0.conv.weight"] = torch.randn(channels, width, 3, 3)
    names["neck.lateral_convs.0.conv.weight"] = torch.randn(width, dims[0], 1, 1)
    decoder = create_decoder(names, {"inputs": dims})
    keys = decoder.state_dict().keys()
    # mmsegmentation's names: convolutions at even places, upsampling between them
    assert "decode_head.scale_heads.3.4.bn.running_var" in keys
    assert "decode_head.scale_heads.1.0.conv.weight" in keys
    assert "neck.fpn_convs.3.conv.bias" in keys
    maps = [torch.randn(1, dim, 32 >> i, 48 >> i) for i, dim in enumerate(dims)]
    assert decoder.eval()(maps).shape == (1, 5, 32, 48)


def test_a_decoder_reads_the_levels_that_it_names() -> None:
    names = {"decode_head.conv_seg.weight": torch.randn(5, 24, 1, 1)}
    inputs = {"inputs": [4, 8, 12, 16]}
    some = create_decoder(names, {**inputs, "in_index": [1, 3]}).eval()
    alone = create_decoder(names, {"inputs": [8, 16]}).eval()
    alone.load_state_dict(some.state_dict())
    maps = [torch.randn(1, dim, 8, 8) for dim in inputs["inputs"]]
    assert torch.equal(some(maps), alone([maps[1], maps[3]]))


def test_a_decoder_cannot_pool_to_any_size() -> None:
    names = {
        "decode_head.conv_seg.weight": torch.randn(5, 4, 1, 1),
        "decode_head.fpn_bottleneck.conv.weight": torch.randn(4, 8, 3, 3),
        "decode_head.psp_modules.0.1.conv.weight": torch.randn(4, 8, 3, 3),
    }
    with pytest.raises(ValueError, match="pool_scales"):
        create_decoder(names, {"inputs": [4, 4], "pool_scales": [10**6]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [99]}, r"layers \[99\]; the trunk has"),
        ({"layers": []}, "layers"),
        ({"inputs": [3]}, "do not fit"),
        ({"labels": ["only one"]}, "1 labels for 4 classes"),
        (
            {"windows": {"scale": [10**6, 10**6], "crop": [8, 8], "stride": [1, 1]}},
            "window settings",
        ),
        ({"windows": {"tilt": 3}}, "window settings"),
        ({"palette": [[0, 0, 0]]}, "palette"),
        ({"palette": [[0, 0, 300]] * 4}, "palette"),
        ({"palette": 3}, "palette"),
        ({"labels": "bogus"}, "no label set"),
    ],
)
def test_decoders_that_do_not_fit_are_refused(
    tiny: Model, change: dict[str, Any], message: str
) -> None:
    network: Any = tiny.trunk.network
    dim = network.embed_dim
    settings = {"layers": [-1], "inputs": [dim], "labels": list("abcd"), **change}
    with pytest.raises(CheckpointError, match=message):
        create_head("semantic", tiny.trunk, (), linear_state(dim, settings))


CONFIGURATION = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='BEiT', init_values=0.1, out_indices=[3, 5, 7, 11], norm_cfg=norm_cfg),
    decode_head={'pool_scales': (1, 2, 3, 6), 'loss_decode': dict(loss_weight=-1.0)},
    test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(426, 426)))
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(2560, 640), flip=False)]
load_from = open('/etc/passwd').read()
import os
data_root = os.environ['HOME'] + '/data'
"""


def test_configurations_are_read_as_data_and_never_run() -> None:
    """mmcv's own form: calls of dict, names, tuples; whatever else there is, is nothing."""
    found = read_configuration(CONFIGURATION)
    assert found["model"]["backbone"] == {
        "type": "BEiT", "init_values": 0.1, "out_indices": [3, 5, 7, 11], "norm_cfg": None,
    }  # fmt: skip
    assert found["model"]["decode_head"]["loss_decode"] == {"loss_weight": -1.0}
    assert found["model"]["test_cfg"]["stride"] == [426, 426]
    assert found["test_pipeline"][0]["img_scale"] == [2560, 640]
    assert found["load_from"] is None
    assert found["data_root"] is None
    for text in ("model = (", "\0", "(" * 10_000, "x = " + "-" * 100_000 + "1", " " * 2_000_000):
        assert not any(read_configuration(text).values())


# -- foregrounds -------------------------------------------------------------------------------


def test_attention_is_thresholded_as_dino_does_it(tiny: Model) -> None:
    head = AttentionMask(tiny.trunk)
    pixels = torch.randn(1, 3, *tiny.trunk.preprocess.input_size)
    with torch.inference_mode():
        output = tiny.trunk.forward(pixels, merge([(head.request, [0])]))
        rank = head.forward(output)["rank"][0].flatten()
    [found] = output.cls_attention.values()
    attention = found[0, :, output.prefix :].mean(0)
    # visualize_attention.py: sorted upwards, what lies in the upper 60 % of the sum
    ordered, order = attention.sort()
    upper = (ordered / ordered.sum()).cumsum(0) > 1 - 0.6
    assert torch.equal(rank > 0.4, upper[order.argsort()])


def test_a_cut_finds_what_stands_apart() -> None:
    features = RANDOM.normal(size=(12, 16, 8)) * 0.1
    features[..., 0] += 1
    features[3:8, 4:9] = RANDOM.normal(size=(5, 5, 8)) * 0.1
    features[3:8, 4:9, 1] += 1
    features[10:, 14:] = features[3:5, 4:6]  # alike, but not connected
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    found = cut(unit.reshape(-1, 8), (12, 16))
    wanted = np.zeros((12, 16))
    wanted[3:8, 4:9] = 1
    assert (found == wanted).mean() > 0.97
    assert not found[10:, 14:].any()
    assert not cut(np.ones((1, 8)), (1, 1)).any()
    assert np.isfinite(cut(np.ones((16, 8)) / 8**0.5, (4, 4))).all()


def test_foregrounds_are_heads_that_a_catalog_can_name(
    tmp_path: Path, tiny_catalog: Path, photos: dict[str, Image.Image]
) -> None:
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    for head in ("tokencut", "attention-mask"):
        text += f'\n[models.{head}]\ntrunk = "tiny"\ntask = "segment"\nhead = "{head}"\n'
    text += '\n[models.nothing]\ntrunk = "tiny"\ntask = "segment"\n'
    text += '\n[models.none]\ntrunk = "conv"\ntask = "segment"\nhead = "attention-mask"\n'
    (tmp_path / "own.toml").write_text(text)
    registry = Registry(load_catalog(tmp_path / "own.toml"), device="cpu")
    for head in ("tokencut", "attention-mask"):
        [answer] = registry.get(head).predict([photos["rocket"]], output="rle", min_area=20)
        assert [item["label"] for item in answer["classes"]] == ["background", "foreground"]
        assert answer["mask"]["size"] == [answer["height"], answer["width"]]
    for name, message in (("nothing", "no head for segment; set head"), ("none", "no attention")):
        with pytest.raises(CatalogError, match=message):
            registry.get(name)


# -- text prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (50, 80), (1, 5000), (3, 2)])
def test_images_come_to_whole_patches(size: tuple[int, int]) -> None:
    view = WholePatches(128, 16)
    [piece] = view.cut(Image.new("RGB", size))
    assert piece.shape[1] % 16 == piece.shape[2] % 16 == 0
    assert max(piece.shape) <= LONGEST * 128
    if max(size) / min(size) < LONGEST:
        assert min(piece.shape[1:]) == 128


def test_labels_in_any_language_are_looked_for(photos: dict[str, Image.Image]) -> None:
    model, _, meta = fixture("clip_dense")
    text: Any = model.text
    vocabulary = meta["hyperparameters"]["vocab_size"]
    tokenize = text.tokenize
    # the fixture's vocabulary is small, and its last two words are start and end
    text.tokenize = lambda words: torch.where(
        tokenize(words) >= 49406, tokenize(words) - 49408 + vocabulary, tokenize(words) % 500
    )
    labels = ["eine Katze", "草地", "небо", "unlabelled"]
    [answer] = model.predict([photos["chelsea"]], labels=labels)
    assert sum(item["pixels"] for item in answer["classes"]) == 451 * 300
    assert {item["label"] for item in answer["classes"]} <= set(labels)
    [logits] = model.predict([photos["chelsea"]], labels=labels, output="logits")
    shares = np.load(io.BytesIO(base64.b64decode(logits["mask"])))
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-4)
    with pytest.raises(InputError, match="labels are missing"):
        model.predict([photos["chelsea"]])
