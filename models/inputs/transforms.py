"""An RGB image to the tensor a trunk expects: the checkpoint's own evaluation transform.

It has two halves. The transform (resize, crop) works on one image on the CPU and returns uint8,
which is small to keep in a queue and to copy to a device. `normalize.Normalize` does the
arithmetic for a whole batch on the trunk's device. Together they equal timm's transform bit for
bit, unless the transform is `fast` or `gpu`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import cv2
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_model_data_config
from timm.data import create_transform as create_timm_transform

from models.errors import CatalogError
from models.inputs.crop_transform import INTERPOLATIONS, OVERSAMPLING, create_crop_transform
from models.inputs.images import cut_sliver
from models.inputs.letterbox import create_letterbox_transform, letterbox
from models.inputs.sampling import create_sampling_transform
from models.inputs.tensor_transform import TensorTransform
from models.inputs.video import FrameChoice

CropMode = Literal["center", "squash", "border", "letterbox"]
TransformName = Literal["exact", "fast", "gpu"]
ChannelOrder = Literal["rgb", "bgr"]
# From an RGB image; the fast transform also takes a `ReducedImage`.
Transform = Callable[[Any], torch.Tensor]

# Settings that need antialiasing, see `create_sampling_transform`.
CROP = {"crop_mode", "crop_pct", "interpolation"}

# Beyond this, resizing the short side first would build an image of gigabytes only to crop it.
MAX_ASPECT_RATIO = {"center": 8, "border": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """An evaluation transform, in timm's words.

    `input_size` is (height, width) in pixels; `crop_mode` is timm's (`center`, `squash`,
    `border`) or `letterbox`: longest side to size by OpenCV's area interpolation, centred on
    black, as albumentations' LongestMaxSize + PadIfNeeded do it; `crop_pct` and `interpolation`
    then play no part. `mean` and `std` are for pixels scaled to 0..1, in the order red, green,
    blue; `channels` is the order in which the network takes them. Without `antialias` an image is
    squashed by TensorFlow's bilinear resize, which skips pixels where it shrinks; its values are
    rounded to whole numbers, or down with `truncate`, which plays no part otherwise. An odd pixel
    beside the crop is on either side, as torchvision has it, or with `crop_early` below and on the
    right, as transformers has it.
    """

    input_size: tuple[int, int] = (224, 224)
    crop_mode: CropMode = "center"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channels: ChannelOrder = "rgb"
    antialias: bool = True
    truncate: bool = False
    crop_early: bool = False
    # Not part of a checkpoint: a trunk sets it, see `Placement`.
    transform: TransformName = "exact"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name. `transform`, `channels`, `antialias`, `truncate` and `crop_early`
        are left out where they are `exact`, `rgb`, true, false and false, so that files and digests
        are as before."""
        settings = asdict(self)
        if self.antialias:
            del settings["antialias"]
        if self.antialias or not self.truncate:
            del settings["truncate"]
        if not self.crop_early:
            del settings["crop_early"]
        if self.transform == "exact":
            del settings["transform"]
        if self.channels == "rgb":
            del settings["channels"]
        return settings

    @property
    def digest(self) -> str:
        """SHA-256 of the transform's settings. Equal digests mean equal input tensors, but for
        `fast`, where they also depend on the size at which an image was decoded, and `gpu`, where
        they depend on what decoded and resized it."""
        return _digest(self)

    @property
    def scale_size(self) -> tuple[int, int]:
        """The (height, width) from which `input_size` is cropped."""
        height, width = self.input_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    @property
    def min_side(self) -> int | None:
        """Pixels of an image's shorter side that the transform needs; None if it needs all."""
        return OVERSAMPLING * max(self.scale_size) if self.transform == "fast" else None

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (height, width) that an image of (width, height) is resized to, as timm does, before
        the crop. Not for letterbox."""
        rows, columns = self.scale_size
        if self.crop_mode == "squash":
            return rows, columns
        if self.crop_mode == "center" and rows == columns:
            long = int(rows * max(width, height) / min(width, height))
            return (rows, long) if width >= height else (long, rows)
        fit = min if self.crop_mode == "center" else max
        ratio = fit(height / rows, width / columns)
        return round(height / ratio), round(width / ratio)

    def region(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What of a (width, height) image the input shows: left, top, right, bottom in the image's
        pixels; beyond its borders where the input has some padding."""
        input_height, input_width = self.input_size
        if (box := self.content_box(width, height)) is not None:
            across, down = width / (box[2] - box[0]), height / (box[3] - box[1])
            left, top = -box[0] * across, -box[1] * down
            return left, top, left + input_width * across, top + input_height * down
        if self.crop_mode == "squash":
            return 0, 0, width, height
        # timm resizes to the input's size by crop_pct, and cuts or fills up around the centre
        rows, columns = self.scale_size
        fit = min if self.crop_mode == "center" else max
        scale = fit(height / rows, width / columns)
        across, down = input_width * scale, input_height * scale
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    def place(self, map_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A float32 map over the input, resized bilinearly to where it lies in an image of `size`
        (width, height); 0 where the input does not show the image. (height, width) float32."""
        width, height = size
        left, top, right, bottom = self.region(width, height)
        rows, columns = map_hw.shape
        # a pixel centre of the image, in cells of the map
        to_map = np.array(
            [
                [columns / (right - left), 0, (0.5 - left) * columns / (right - left) - 0.5],
                [0, rows / (bottom - top), (0.5 - top) * rows / (bottom - top) - 0.5],
            ]
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        placed = cv2.warpAffine(
            map_hw, to_map, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
        first, last = max(0, math.floor(left)), min(width, math.ceil(right))
        above, below = max(0, math.floor(top)), min(height, math.ceil(bottom))
        result = np.zeros((height, width), np.float32)
        result[above:below, first:last] = placed[above:below, first:last]
        return result

    def content_box(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """Where a (width, height) image lies in the input: left, top, right, bottom pixels.

        None where the whole input is covered by a crop of the image.
        """
        if self.crop_mode != "letterbox":
            return None
        return letterbox(width, height, self.input_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPreprocess(Preprocess):
    """An evaluation transform of clips, frame by frame."""

    frames: int
    sampling_rate: int = 4

    @property
    def choice(self) -> FrameChoice:
        """The frames that are taken."""
        return FrameChoice(self.frames, self.sampling_rate)


@lru_cache(maxsize=1024)
def _digest(preprocess: Preprocess) -> str:
    settings = json.dumps(preprocess.settings, sort_keys=True)
    return "sha256:" + hashlib.sha256(settings.encode()).hexdigest()


def preprocess_from_timm(network: torch.nn.Module) -> Preprocess:
    """The evaluation transform that a timm network's pretrained configuration asks for."""
    return preprocess_from_mapping(resolve_model_data_config(network))


def preprocess_from_mapping(
    config: Mapping[str, Any], base: Preprocess | None = None
) -> Preprocess:
    """Read timm's data configuration or a catalog's `preprocess` table, over `base`.

    A table with a crop or an interpolation has antialiasing, unless it says otherwise.

    Raises:
        CatalogError: for a key or value that no transform has.
    """
    kind = ClipPreprocess if "frames" in config else type(base) if base else Preprocess
    settings: dict[str, Any] = asdict(base) if base else {}
    for key, value in config.items():
        if key not in (known := kind.__dataclass_fields__.keys() - {"transform"}):
            some = ", ".join(sorted(known))
            raise CatalogError(f"preprocess has no setting {key!r}; it has {some}")
        settings[key] = tuple(value) if isinstance(value, list) else value
    if CROP & config.keys():
        settings["antialias"] = config.get("antialias", True)
    if len(size := settings.get("input_size", (224, 224))) == 3:  # timm's has channels first
        settings["input_size"] = tuple(size[1:])
    if settings.get("crop_mode", "center") not in ("center", "squash", "border", "letterbox"):
        raise CatalogError(f"preprocess has no crop_mode {settings['crop_mode']!r}")
    if (order := settings.get("channels", "rgb")) not in get_args(ChannelOrder):
        raise CatalogError(f"preprocess has no channels {order!r}; it has rgb and bgr")
    for key in ("antialias", "truncate"):
        if not isinstance(settings.get(key, True), bool):
            raise CatalogError(f"preprocess has {key} that is neither true nor false")
    return kind(**settings)


def resolve_transform(name: str) -> TransformName:
    """A transform's name, checked.

    Raises:
        CatalogError: there is no such transform.
    """
    if name not in get_args(TransformName):
        raise CatalogError(
            f"unknown transform {name!r}; there are {', '.join(get_args(TransformName))}"
        )
    return cast("TransformName", name)


def create_transform(spec: Preprocess) -> Transform:
    """Build the transform: RGB image to (3, height, width) uint8.

    Raises:
        CatalogError: `fast` or `gpu` with a crop mode or interpolation that it does not have; no
            antialias with any but a bilinear squash.
    """
    has_crop = spec.antialias and (
        spec.crop_mode != "letterbox" and spec.interpolation in INTERPOLATIONS
    )
    if spec.transform != "exact" and not has_crop:
        raise CatalogError(
            f"the {spec.transform} transform has no {spec.crop_mode} with {spec.interpolation}"
            f"{'' if spec.antialias else ' without antialias'}; it has center, squash and border "
            f"with {' and '.join(INTERPOLATIONS)}"
        )
    if spec.transform == "gpu":
        return _tensor_transform(spec)
    if not spec.antialias:
        steps = (spec.crop_mode, spec.crop_pct, spec.interpolation)
        return create_sampling_transform(spec.input_size, steps, truncate=spec.truncate)
    if spec.crop_mode == "letterbox":
        return create_letterbox_transform(spec.input_size)
    transform = _crop_transform(spec) if has_crop else _timm_transform(spec)
    if (max_ratio := MAX_ASPECT_RATIO.get(spec.crop_mode)) is None:
        return transform
    return lambda image: transform(cut_sliver(image, max_ratio))


def _timm_transform(spec: Preprocess) -> Transform:
    """timm's own transform, which resizes more than the crop keeps."""
    transform = create_timm_transform(
        input_size=(3, *spec.input_size),
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        normalize=False,
    )
    return cast("Transform", transform)


def _crop_transform(spec: Preprocess) -> Transform:
    return create_crop_transform(
        spec.input_size, spec.interpolation, _fill(spec), spec.resized, early=spec.crop_early
    )


def _tensor_transform(spec: Preprocess) -> TensorTransform:
    return TensorTransform(
        spec.input_size, spec.interpolation, _fill(spec), spec.resized, spec.crop_early,
        MAX_ASPECT_RATIO.get(spec.crop_mode),
    )  # fmt: skip


def _fill(spec: Preprocess) -> tuple[int, int, int]:
    """What timm's transform pads with; see `_timm_transform`."""
    mean = IMAGENET_DEFAULT_MEAN if spec.crop_mode == "border" else (0.0, 0.0, 0.0)
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue
