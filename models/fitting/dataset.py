"""The images of a fit: decoded, preprocessed, and split into training and held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.errors import InputError
from models.fitting.examples import Example, check_classes, split
from models.fitting.options import FitOptions
from models.inference import decode
from models.inputs.images import ImageLimits
from models.trunks.base import Trunk


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a fit.

    Args:
        stage: "images", "features" or "training".
        done, total: images, or epochs while training.
        accuracy: the best accuracy on held-out images so far.
    """

    stage: str
    done: int
    total: int
    accuracy: float | None = None


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The readable images, and their split.

    Args:
        pixels: uint8 (N, 3, H, W), on disk. The readable images come first; the rest is unused.
        readable: the readable examples, without their encoded images.
        skipped: `name` and `reason` of each image that cannot be read.
        labels: the classes' names.
        targets: the readable images' class indices, int64.
        learn, held: the positions of the training images and of the held-out images.
    """

    pixels: np.memmap
    readable: list[Example]
    skipped: list[dict[str, str]]
    labels: list[str]
    targets: np.ndarray
    learn: np.ndarray
    held: np.ndarray


def prepare_dataset(
    examples: Sequence[Example],
    trunk: Trunk,
    folder: Path,
    options: FitOptions,
    limits: ImageLimits,
    progress: Report,
) -> Dataset:
    """Decode and preprocess the images that can be read, and split them.

    Raises:
        InputError: fewer than two classes, or a class with fewer than two readable images.
    """
    check_classes(examples)
    shape = (len(examples), 3, *trunk.preprocess.input_size)
    pixels = np.memmap(folder / "pixels.bin", np.uint8, "w+", shape=shape)
    readable: list[Example] = []
    skipped: list[dict[str, str]] = []
    for number, example in enumerate(examples):
        try:
            image = decode(example.read(), limits, trunk.min_side)
            pixels[len(readable)] = trunk.prepare(image).numpy()
            readable.append(replace(example, image=b""))
        except (InputError, OSError) as error:
            skipped.append({"name": example.name, "reason": str(error)})
        progress(Progress("images", number + 1, len(examples)))
    _check_readable(readable, skipped)
    labels = sorted({example.label for example in readable})
    targets = np.array([labels.index(example.label) for example in readable])
    learn, held = split([example.label for example in readable], options.holdout, options.seed)
    return Dataset(pixels, readable, skipped, labels, targets, learn, held)


def _check_readable(readable: list[Example], skipped: list[dict[str, str]]) -> None:
    try:
        check_classes(readable)
    except InputError as error:
        if not skipped:
            raise
        raise InputError(
            f"{error}, after {len(skipped)} unreadable images, the first of which is "
            f"{skipped[0]['name']}: {skipped[0]['reason']}",
            field=error.field,
        ) from error
