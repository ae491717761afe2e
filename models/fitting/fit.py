"""From labelled images and a frozen trunk to a head's file and a report on how that went."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import InputError
from models.fitting.examples import Example, check_classes, split
from models.fitting.features import Features, ReadFeatures, Row
from models.fitting.options import FitOptions
from models.fitting.training import (
    Epoch,
    Learner,
    LinearLearner,
    Training,
    VqtLearner,
    curve_rows,
)
from models.heads.files import HeadFile
from models.heads.linear import Linear
from models.inputs.images import DEFAULT_LIMITS, ImageLimits, decode_image
from models.inputs.transforms import create_transform
from models.trunks.base import Trunk

BATCH = 8
LIMIT_BYTES = 16 * 2**30

# (pixels uint8 (B, 3, H, W), what is to be read of them) to a row each
Run = Callable[[Tensor, ReadFeatures], list[Row]]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a fit is: `done` of `total` images or epochs; `accuracy` on what is held out."""

    stage: str
    done: int
    total: int
    accuracy: float | None = None


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """The head, and everything about its making as plain values for JSON."""

    head: HeadFile
    report: dict[str, Any]


def run_directly(trunk: Trunk) -> Run:
    """Passes in this thread."""

    def run(pixels_BCHW: Tensor, head: ReadFeatures) -> list[Row]:
        with torch.inference_mode():
            tensors = head.forward(trunk.forward(pixels_BCHW, head.needs(range(len(pixels_BCHW)))))
            arrays = {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(pixels_BCHW))]

    return run


def fit(
    examples: Sequence[Example],
    trunk: Trunk,
    trunk_name: str,
    options: FitOptions,
    folder: Path,
    *,
    run: Run,
    progress: Report,
    trunk_source: str = "",
    limits: ImageLimits = DEFAULT_LIMITS,
    limit_bytes: int = LIMIT_BYTES,
) -> Fitted:
    """Fit a head.

    Args:
        folder: for temporary files of up to `limit_bytes`, and the images as the trunk takes them.
        run: passes of the trunk.
        progress: called now and then; what it raises ends the fit.
        trunk_source: where the trunk came from, if that is pinned.

    Raises:
        InputError: options out of range, a class with one readable image, a single class.
        CheckpointError: the trunk cannot carry such a head.
    """
    started = time.monotonic()
    reader = create_reader(trunk, trunk_name, options)
    check_classes(examples)
    pixels, readable, skipped = _prepare(examples, trunk, folder, limits, progress)
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
    labels = sorted({example.label for example in readable})
    targets = np.array([labels.index(example.label) for example in readable])
    learn, held = split([example.label for example in readable], options.holdout, options.seed)

    def compute(positions: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        for some in _batches(list(positions)):
            rows += run(torch.from_numpy(pixels[some]), reader)
        return rows

    features = Features(compute, len(readable), folder, limit_bytes)
    seen = 0

    def count(more: int) -> None:
        nonlocal seen
        seen += more
        progress(Progress("features", seen, len(readable)))

    features.fill(_batches(list(range(len(readable)))), count)
    torch.manual_seed(options.seed)
    learner: Learner
    if options.kind == "linear":
        learner = LinearLearner(features, learn, len(labels))
    else:
        learner = VqtLearner(trunk, options.queries, len(labels))
    at = Progress("training", 0, options.epochs * (1 if options.keep == 1 else 2))

    def watch(point: Epoch) -> None:
        nonlocal at
        best = max(at.accuracy or 0.0, point.holdout_accuracy)
        at = replace(at, done=point.epoch, accuracy=best)

    training = Training(
        learner,
        features,
        targets,
        learn,
        held,
        options,
        trunk.placement.device,
        watch,
        lambda: progress(at),
    )
    indices, point = _train(training, learner, options)
    predicted = training.predict(indices)
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (targets[held], predicted), 1)
    summary = {
        "images": len(readable),
        "classes": len(labels),
        "holdout_images": len(held),
        "holdout_accuracy": point.holdout_accuracy,
        "best_epoch": point.epoch,
        "options": asdict(options),
    }
    head = HeadFile(
        kind=options.kind,
        trunk=trunk_name,
        trunk_digest=trunk.digest,
        trunk_source=trunk_source,
        preprocess_digest=trunk.preprocess.digest,
        labels=tuple(labels),
        state=_state(learner, indices, options),
        training=summary,
    )
    report = summary | {
        "kind": options.kind,
        "trunk": trunk_name,
        "images_by_class": dict(Counter(example.label for example in readable)),
        "skipped": skipped,
        "holdout": [readable[i].name for i in held],
        "labels": labels,
        "confusion": confusion.tolist(),
        "curve": curve_rows(training.curve),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Fitted(head, report)


def _train(
    training: Training, learner: Learner, options: FitOptions
) -> tuple[Tensor | None, Epoch]:
    """Train; where features are to be selected, train again on the strongest of them."""
    if options.keep == 1:
        return None, training.run()
    training.run(lasso=options.lasso)
    classifier = learner.classifier
    count = max(1, int(options.keep * classifier.in_features))
    strength = classifier.weight.detach().norm(dim=0)
    indices = strength.topk(count).indices.sort().values
    selected = torch.nn.Linear(count, classifier.out_features, device=strength.device)
    with torch.no_grad():
        selected.weight.copy_(classifier.weight[:, indices])
        selected.bias.copy_(classifier.bias)
    learner.classifier = selected
    return indices, training.run(indices)


def _state(learner: Learner, indices: Tensor | None, options: FitOptions) -> HeadState:
    """The learner's weights as a head's file has them; scaled features are put into those of the
    classifier."""
    weight = learner.classifier.weight.detach()
    bias = learner.classifier.bias.detach()
    tensors = learner.tensors()
    if isinstance(learner, LinearLearner):
        mean, std = learner.mean, learner.std
        if indices is not None:  # a linear head sees all features: the others weigh nothing
            whole = weight.new_zeros(len(weight), len(mean))
            whole[:, indices] = weight
            weight, indices = whole, None
        weight = weight / std
        bias = bias - weight @ mean
    if indices is not None:
        tensors["indices"] = indices
    tensors |= {"classifier.0.weight": weight, "classifier.0.bias": bias}
    settings = {"layers": list(range(-options.layers, 0))} if options.kind == "linear" else {}
    return HeadState({name: tensor.cpu() for name, tensor in tensors.items()}, settings)


def create_reader(trunk: Trunk, trunk_name: str, options: FitOptions) -> ReadFeatures:
    """What reads the features that such a head is made from.

    Raises:
        InputError: an option out of range, or a trunk that takes no images.
        CheckpointError: the trunk cannot carry such a head.
    """
    options.check()
    if trunk.modality != "image":
        raise InputError(f"{trunk_name} takes no images", field="trunk")
    return ReadFeatures(trunk, options.kind, _linear(trunk, options))


def _linear(trunk: Trunk, options: FitOptions) -> Linear | None:
    """A linear head without a classifier, for its features; None for other kinds."""
    if options.kind != "linear":
        return None
    if options.layers > len(trunk.blocks):
        raise InputError(
            f"layers is {options.layers}; the trunk has {len(trunk.blocks)} blocks to read",
            field="layers",
        )
    settings = {"layers": list(range(-options.layers, 0))}
    blank = {"classifier.0.weight": torch.zeros(1, 1), "classifier.0.bias": torch.zeros(1)}
    return Linear(trunk, ("",), HeadState(blank, settings))


def _prepare(
    examples: Sequence[Example],
    trunk: Trunk,
    folder: Path,
    limits: ImageLimits,
    progress: Report,
) -> tuple[np.memmap, list[Example], list[dict[str, str]]]:
    """Pixels as the trunk takes them, uint8 (N, 3, H, W) on disk, of the examples that can be read;
    and why the others cannot."""
    transform = create_transform(trunk.preprocess)
    shape = (len(examples), 3, *trunk.preprocess.input_size)
    pixels = np.memmap(folder / "pixels.bin", np.uint8, "w+", shape=shape)
    readable: list[Example] = []
    skipped: list[dict[str, str]] = []
    for number, example in enumerate(examples):
        try:
            pixels[len(readable)] = transform(decode_image(example.read(), limits)).numpy()
            readable.append(replace(example, image=b""))
        except (InputError, OSError) as error:
            skipped.append({"name": example.name, "reason": str(error)})
        progress(Progress("images", number + 1, len(examples)))
    return pixels, readable, skipped


def _batches(positions: list[int]) -> list[list[int]]:
    return [positions[start : start + BATCH] for start in range(0, len(positions), BATCH)]
