"""The transform that transformers' image processors state beside weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.families.known import flag, number, whole
from models.checkpoints.families.transformers.configuration import read_beside
from models.errors import CheckpointError
from models.inputs.crop_transform import INTERPOLATIONS
from models.inputs.transforms import CropMode, Preprocess

PROCESSOR = "preprocessor_config.json"
PROCESSORS = (
    "processor_config.json"  # of two towers since transformers 5; it has the other's content
)
# By PIL's numbers.
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# What image processors do where their file says nothing: whether a `size` of one number is of both
# sides, and the sides of the crop. By the beginning of their names, which end in `ImageProcessor`,
# `ImageProcessorFast` and the like, or `FeatureExtractor`; else by the kind of the network.
ENDING = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$")
BY_KIND = {
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "swin", "swinv2"), "ViT"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "Bit"),
    **dict.fromkeys(("convnext", "convnextv2", "resnet"), "ConvNext"),
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
    "deit": "DeiT",
    "clip": "CLIP",
    **dict.fromkeys(("dinov3_vit", "dinov3_convnext"), "DINOv3ViT"),
    "mobilenet_v2": "MobileNetV2",
}
SQUARE = ("ViT", "DeiT", "Beit", "DINOv3ViT")
CROP = {"DeiT": 224, "Bit": 224, "CLIP": 224, "MobileNetV2": 224}
# Whose versions crop, or do not, where their file says nothing.
UNDECIDED = ("Beit",)
# What the files say to do, and what of it does not change the pixels of an RGB image.
HARMLESS = ("do_convert_rgb", "do_reduce_labels")
DONE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
CONVNEXT = "ConvNext"
# From this shorter side on, ConvNeXt's images are squashed to a square instead of being cropped.
CONVNEXT_WHOLE = 384


def read_preprocess(path: Path, kind: str) -> Preprocess:
    """The transform that `preprocessor_config.json` beside a checkpoint states.

    Resizes and crops are Pillow's, as with transformers' image processors of that name; those that
    use torchvision, DINOv3's only one among them, differ by up to one step of a pixel's 255.

    Args:
        kind: `model_type` of the network.

    Raises:
        CheckpointError: there is none, or it has an option that is not supported.
    """
    nested = read_beside(path, PROCESSORS).get("image_processor")
    name = PROCESSORS if isinstance(nested, dict) else PROCESSOR
    config = nested if isinstance(nested, dict) else read_beside(path, PROCESSOR)
    if not config:
        raise CheckpointError(
            f"{path}: {PROCESSOR} is missing beside the file; without it nothing tells the "
            "transform. A fine-tuned model has that of the one that it began with"
        )
    try:
        return _preprocess({k: v for k, v in config.items() if v is not None}, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent / name}: {error}") from error


def _preprocess(config: Mapping[str, Any], kind: str) -> Preprocess:
    steps = {key for key, value in config.items() if key.startswith("do_") and value}
    if config.get("use_square_size"):
        steps.add("use_square_size")
    if unknown := steps - {*DONE, *HARMLESS}:
        raise CheckpointError(f"{', '.join(sorted(unknown))} is not supported")
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
        squared = flag("default_to_square", config.get("default_to_square", processor in SQUARE))
        sides = ("height", "width") if squared else ("shortest_edge",)
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
    crops = config.get("do_center_crop", None if processor in UNDECIDED else processor in CROP)
    if crops is None:
        raise CheckpointError("do_center_crop is missing; versions of the processor differ in it")
    crops = flag("do_center_crop", crops)
    if processor == CONVNEXT:
        if mode != "center" or (crops and _crop(config, processor) != resized):
            raise CheckpointError(f"size {size} with crop_size {config.get('crop_size')}")
        if resized[0] >= CONVNEXT_WHOLE:
            return "squash", resized, 1.0
        return mode, resized, number("crop_pct", config.get("crop_pct", 224 / 256))
    if not crops:
        if mode == "center":
            raise CheckpointError("images keep their shape without a crop, which is not supported")
        return mode, resized, 1.0
    cropped = _crop(config, processor)
    share = cropped[0] / resized[0]
    if math.floor(cropped[0] / share) < resized[0]:  # the quotient was rounded up
        share = math.nextafter(share, 0)
    spec = Preprocess(input_size=cropped, crop_mode=mode, crop_pct=share)
    if share > 1 or spec.scale_size != resized:
        raise CheckpointError(f"size {resized} with crop_size {cropped} is not supported")
    return mode, cropped, share


def _crop(config: Mapping[str, Any], processor: str) -> tuple[int, int]:
    """The (height, width) of the crop."""
    crop = config.get("crop_size", CROP.get(processor))
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if not isinstance(crop, Mapping):
        raise CheckpointError(f"crop_size is {crop!r}; it must have height and width")
    return whole("crop_size", crop.get("height")), whole("crop_size", crop.get("width"))


def _statistics(config: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    values = config.get(name)
    if not isinstance(values, list) or len(values) != 3:
        raise CheckpointError(f"{name} is {values!r}; it must have three numbers")
    return number(name, values[0]), number(name, values[1]), number(name, values[2])
