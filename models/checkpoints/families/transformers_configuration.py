"""The configurations that transformers saves beside weights, and the transform that they state."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.families.known import flag, number, whole
from models.errors import CheckpointError
from models.inputs.crop_transform import INTERPOLATIONS
from models.inputs.transforms import CropMode, Preprocess
from models.tasks.labels import as_label

FILE = "config.json"
PROCESSOR = "preprocessor_config.json"
PROCESSORS = "processor_config.json"  # of CLIPs since transformers 5; it has the other's content
# By PIL's numbers.
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# What image processors do where their file says nothing: whether a `size` of one number is of both
# sides, and the sides of the crop. By the beginning of their names, which end in `ImageProcessor`,
# `ImageProcessorFast` and the like, or `FeatureExtractor`; else by the kind of the network.
ENDING = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$")
BY_KIND = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit",
           "convnext": "ConvNext", "convnextv2": "ConvNext", "clip": "CLIP"}  # fmt: skip
SQUARE = ("ViT", "DeiT")
CROP = {"DeiT": 224, "Bit": 224, "CLIP": 224}
CONVNEXT = "ConvNext"
# From this shorter side on, ConvNeXt's images are squashed to a square instead of being cropped.
CONVNEXT_WHOLE = 384


def read_beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file beside a checkpoint; empty if there is no such file.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    file = path.parent / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a configuration: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a configuration")
    return content


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names of `config.json`, in order; empty if they are only numbered, or some class
    has none."""
    named = config.get("id2label")
    if not isinstance(named, Mapping) or all(
        name == f"LABEL_{index}" for index, name in named.items()
    ):
        return ()
    if named.keys() != set(map(str, range(len(named)))):  # ConvNeXt's with 21,841 classes
        return ()
    return tuple(as_label(named[str(index)]) for index in range(len(named)))


def read_preprocess(path: Path, kind: str) -> Preprocess:
    """The transform that `preprocessor_config.json` beside a checkpoint states.

    Resizes and crops are Pillow's, as with transformers' slow image processors; the fast ones
    differ from these by up to one step of a pixel's 255.

    Args:
        kind: `model_type` of the network.

    Raises:
        CheckpointError: there is none, or it has an option that is not supported.
    """
    nested = read_beside(path, PROCESSORS).get("image_processor")
    config = nested if isinstance(nested, dict) else read_beside(path, PROCESSOR)
    if not config:
        raise CheckpointError(
            f"{path}: {PROCESSOR} is missing beside the file; without it nothing tells the "
            "transform. A fine-tuned model has that of the one that it began with"
        )
    try:
        return _preprocess({k: v for k, v in config.items() if v is not None}, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent / PROCESSOR}: {error}") from error


def _preprocess(config: Mapping[str, Any], kind: str) -> Preprocess:
    if not flag("do_resize", config.get("do_resize", True)):
        raise CheckpointError("do_resize is false; images of any size are not supported")
    scale = number("rescale_factor", config.get("rescale_factor", 1 / 255))
    if not flag("do_rescale", config.get("do_rescale", True)) or abs(scale * 255 - 1) > 1e-6:
        raise CheckpointError("pixels are not scaled to 0..1, which is not supported")
    resample = config.get("resample")
    interpolation = RESAMPLING.get(resample) if isinstance(resample, int) else None
    if interpolation not in INTERPOLATIONS:
        raise CheckpointError(f"resample is {resample!r}, which is not supported")
    mode, size, share = _geometry(config, _processor(config, kind))
    mean, std = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if flag("do_normalize", config.get("do_normalize", True)):
        mean, std = _statistics(config, "image_mean"), _statistics(config, "image_std")
    return Preprocess(
        input_size=size,
        crop_mode=mode,
        crop_pct=share,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_early=share < 1 or mode == "center",
    )


def _processor(config: Mapping[str, Any], kind: str) -> str:
    """The beginning of the image processor's name.

    Raises:
        CheckpointError: it is none that is supported.
    """
    named = config.get("image_processor_type", config.get("feature_extractor_type"))
    processor = ENDING.sub("", str(named)) if named else BY_KIND[kind]
    if processor not in BY_KIND.values():
        raise CheckpointError(f"the image processor {named} is not supported")
    return processor


def _geometry(config: Mapping[str, Any], processor: str) -> tuple[CropMode, tuple[int, int], float]:
    """How an image is cropped, the (height, width) of the input, and its share of the resized one.

    Raises:
        CheckpointError: no transform resizes to one of the sizes and crops to the other.
    """
    size = config.get("size")
    if isinstance(size, int):
        sides = ("height", "width") if processor in SQUARE else ("shortest_edge",)
        size = dict.fromkeys(sides, size)
    if not isinstance(size, Mapping) or size.keys() not in (
        {"height", "width"},
        {"shortest_edge"},
    ):
        raise CheckpointError(f"size is {size!r}; it must have height and width, or shortest_edge")
    mode: CropMode = "center" if "shortest_edge" in size else "squash"
    resized = (
        whole("size", size.get("height", size.get("shortest_edge"))),
        whole("size", size.get("width", size.get("shortest_edge"))),
    )
    if processor == CONVNEXT:
        if resized[0] >= CONVNEXT_WHOLE:
            return "squash", resized, 1.0
        return mode, resized, number("crop_pct", config.get("crop_pct", 224 / 256))
    if not flag("do_center_crop", config.get("do_center_crop", processor in CROP)):
        if mode == "center":
            raise CheckpointError("images keep their shape without a crop, which is not supported")
        return mode, resized, 1.0
    crop = config.get("crop_size", CROP.get(processor))
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if not isinstance(crop, Mapping):
        raise CheckpointError(f"crop_size is {crop!r}; it must have height and width")
    cropped = (
        whole("crop_size", crop.get("height")),
        whole("crop_size", crop.get("width")),
    )
    share = cropped[0] / resized[0]
    spec = Preprocess(input_size=cropped, crop_mode=mode, crop_pct=share)
    if share > 1 or spec.scale_size != resized:
        raise CheckpointError(f"size {resized} with crop_size {cropped} is not supported")
    return mode, cropped, share


def _statistics(config: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    values = config.get(name)
    if not isinstance(values, list) or len(values) != 3:
        raise CheckpointError(f"{name} is {values!r}; it must have three numbers")
    return number(name, values[0]), number(name, values[1]), number(name, values[2])
