"""Compares a model as it is served with eager float32, and with the library of its network."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import EngineError, InputError
from models.heads.base import Head
from models.inference import HeadCall, decode, least_side, prepare_pieces, run_rows
from models.inputs.images import DEFAULT_LIMITS, SUFFIXES
from models.inputs.samples import sample_photos
from models.model import Model
from models.trunks.base import Trunk
from models.trunks.engines.built import BuiltEngine
from models.trunks.features import LAST_OUTPUT
from models.verification.comparison import (
    FLOAT32_TOLERANCE,
    Comparison,
    Outputs,
    compare_outputs,
)
from models.verification.libraries import Library

SAMPLES = 8
MAX_IMAGES = 1000
# How long an engine may take to choose how it runs the passes.
SETTLE_S = 300
TEXTS = ("a photo of a cat", "two dogs on a beach", "a cup of coffee on a wooden table", "rocket")


def read_photos(folder: Path | None) -> Sequence[bytes | Image.Image]:
    """The encoded images of a folder and its subfolders; the package's own photos without one.

    Raises:
        InputError: no image there, too many, or one that cannot be read.
    """
    if folder is None:
        return sample_photos(SAMPLES)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not 1 <= len(files) <= MAX_IMAGES:
        raise InputError(f"{folder} has {len(files)} images; there can be 1 to {MAX_IMAGES}")
    try:
        return [path.read_bytes() for path in files]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def verify(
    served: Model,
    eager: Model,
    libraries: Sequence[Library],
    photos: Sequence[bytes | Image.Image],
    tolerance: float | None = None,
) -> Iterator[Comparison]:
    """Compare a model with its references, one after another.

    Args:
        served: with the engine, precision and transform that serve it.
        eager: the same checkpoint, run eagerly in float32 with the exact transform.
        libraries: other implementations of the checkpoint.
        photos: what models of images are compared on. Others have samples of their own.
        tolerance: the largest error over the largest value; None: the catalog's, or else 1e-5 for
            float32 with the exact transform.

    Raises:
        InputError: a photo that cannot be decoded.
        EngineError: outputs that cannot be compared.
    """
    settle(served.trunk)
    if tolerance is None:
        tolerance = _own_tolerance(served.trunk)
    actual = outputs_of(served, photos)
    yield compare_outputs("eager float32", outputs_of(eager, photos), actual, tolerance)
    if served.text is not None and served.text is not served.trunk:
        yield _compare_texts(served, eager, tolerance)
    for library in libraries:
        if library.run is None:
            yield Comparison(library.name, {}, 0, tolerance)
            continue
        images = [decode(photo, DEFAULT_LIMITS) for photo in photos]
        expected = [library.run(image) for image in images]
        yield compare_outputs(library.name, expected, actual, tolerance)


def outputs_of(model: Model, photos: Sequence[bytes | Image.Image]) -> list[Outputs]:
    """For each input what the heads for the model's own task and for `embed` return. Outputs of
    further pieces of an input that is cut are named `NAME.1`, `NAME.2`, ..."""
    items = photos if model.trunk.modality == "image" else model.trunk.samples(SAMPLES)
    return [_outputs(model, item) for item in items]


def text_outputs_of(model: Model) -> list[Outputs]:
    """The embeddings of texts, of a model that takes images and texts.

    Raises:
        EngineError: the tokenizer has more tokens than the weights.
    """
    try:
        return [{"embedding": row} for row in model.embed_texts(TEXTS, normalize=False)]
    except IndexError as error:
        raise EngineError("the tokenizer has more tokens than the weights") from error


def _compare_texts(served: Model, eager: Model, tolerance: float | None) -> Comparison:
    name = "eager float32, of texts"
    try:
        expected = text_outputs_of(eager)
    except (EngineError, InputError) as error:  # the tokenizer is another's, or not here
        return Comparison(f"{name}: not compared; {error}", {}, 0, tolerance)
    assert served.text is not None
    settle(served.text)
    return compare_outputs(name, expected, text_outputs_of(served), tolerance)


def settle(trunk: Trunk) -> None:
    """Run samples until the engine has chosen how it runs the trunk's passes.

    Raises:
        EngineError: it takes too long, or cannot run them in a precision that eager does not have.
    """
    end = time.monotonic() + SETTLE_S
    batch = trunk.collate(trunk.samples(1))
    if isinstance(trunk.engine, BuiltEngine):  # faster alone than beside eager passes
        trunk.build(LAST_OUTPUT)
    with torch.inference_mode():
        trunk.forward(batch)
        while not trunk.engine.settled:
            if time.monotonic() > end:
                raise EngineError(f"{trunk.engine.name} has not chosen an engine in {SETTLE_S} s")
            trunk.forward(batch)


def _own_tolerance(trunk: Trunk) -> float | None:
    placement = trunk.placement
    if placement.tolerance is not None:
        return placement.tolerance
    exact = placement.precision == "float32" and placement.transform == "exact"
    return FLOAT32_TOLERANCE if exact else None


def _outputs(model: Model, item: bytes | Image.Image | Tensor) -> Outputs:
    """The outputs for a photo, or for an input that the trunk has prepared."""
    outputs: dict[str, np.ndarray] = {}
    for task in dict.fromkeys((model.task, "embed")):
        if (head := model.heads.get(task)) is None:
            continue
        trunk, call = model.trunk, HeadCall(head)
        pieces = [item] if isinstance(item, Tensor) else _pieces(model, head, item)
        for number, piece in enumerate(pieces):
            [row] = run_rows(trunk, trunk.collate([piece]), call)
            ending = f".{number}" if number else ""
            outputs |= {f"{name}{ending}": array for name, array in row.items()}
    return outputs


def _pieces(model: Model, head: Head, photo: bytes | Image.Image) -> list[Tensor]:
    image = decode(photo, DEFAULT_LIMITS, least_side([(model.trunk, head.view)]))
    return prepare_pieces(image, model.trunk, head.view, DEFAULT_LIMITS)
