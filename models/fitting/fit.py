"""Fits a head to labelled images on a frozen trunk, and reports on the training."""

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
from models.fitting.dataset import Dataset, Progress, Report, prepare_dataset
from models.fitting.examples import Example
from models.fitting.features import Features, ReadFeatures
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
from models.inference import HeadCall, run_rows
from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.started_pass import Row
from models.trunks.base import Trunk

BATCH = 8
LIMIT_BYTES = 16 * 2**30

# Runs a pass: uint8 pixels (B, 3, H, W), and the head that reads the features; returns B rows.
Run = Callable[[Tensor, ReadFeatures], list[Row]]


@dataclass(frozen=True, slots=True)
class Fitted:
    """The head, and a report on its training as plain values for JSON."""

    head: HeadFile
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of training.

    Args:
        indices: the features that the classifier takes; None for all.
        predicted: the predicted class indices of the held-out images, int64.
    """

    learner: Learner
    indices: Tensor | None
    best: Epoch
    curve: list[Epoch]
    predicted: np.ndarray


def run_directly(trunk: Trunk) -> Run:
    """A `Run` that runs passes in the calling thread."""

    def run(pixels_BCHW: Tensor, head: ReadFeatures) -> list[Row]:
        return run_rows(trunk, pixels_BCHW, HeadCall(head))

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
        folder: for temporary files: the preprocessed images, and up to `limit_bytes` of features.
        run: runs passes of the trunk.
        progress: called often. An exception that it raises ends the fit.
        trunk_source: the trunk's source, for the head's file.

    Raises:
        InputError: options out of range, fewer than two classes, or a class with fewer than two
            readable images.
        CheckpointError: a head of this kind does not fit the trunk.
    """
    started = time.monotonic()
    reader = create_reader(trunk, trunk_name, options)
    dataset = prepare_dataset(examples, trunk, folder, options, limits, progress)
    features = _compute_features(dataset, reader, folder, limit_bytes, run, progress)
    outcome = _train(dataset, features, trunk, options, progress)
    summary = {
        "images": len(dataset.readable),
        "classes": len(dataset.labels),
        "holdout_images": len(dataset.held),
        "holdout_accuracy": outcome.best.holdout_accuracy,
        "best_epoch": outcome.best.epoch,
        "options": asdict(options),
    }
    head = HeadFile(
        kind=options.kind,
        trunk=trunk_name,
        trunk_digest=trunk.digest,
        trunk_source=trunk_source,
        preprocess_digest=trunk.preprocess.digest,
        labels=tuple(dataset.labels),
        state=_state(outcome.learner, outcome.indices, options),
        training=summary,
    )
    report = {
        **summary,
        "kind": options.kind,
        "trunk": trunk_name,
        **_details(dataset, outcome),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Fitted(head, report)


def create_reader(trunk: Trunk, trunk_name: str, options: FitOptions) -> ReadFeatures:
    """The head that reads the features for training.

    Raises:
        InputError: an option is out of range, or the trunk does not take images.
        CheckpointError: a head of this kind does not fit the trunk.
    """
    options.check()
    if trunk.modality != "image":
        raise InputError(f"the trunk {trunk_name!r} does not take images", field="trunk")
    return ReadFeatures(trunk, options.kind, _linear(trunk, options))


def _linear(trunk: Trunk, options: FitOptions) -> Linear | None:
    """A linear head with an empty classifier, used for its features; None for other kinds."""
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


def _compute_features(
    dataset: Dataset,
    reader: ReadFeatures,
    folder: Path,
    limit_bytes: int,
    run: Run,
    progress: Report,
) -> Features:
    """The trunk's features of all images, computed once and cached up to `limit_bytes`."""
    count = len(dataset.readable)

    def compute(positions: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        for batch in _batches(list(positions)):
            rows += run(torch.from_numpy(dataset.pixels[batch]), reader)
        return rows

    done = 0

    def advance(count_done: int) -> None:
        nonlocal done
        done += count_done
        progress(Progress("features", done, count))

    features = Features(compute, count, folder, limit_bytes)
    features.fill(_batches(list(range(count))), advance)
    return features


def _train(
    dataset: Dataset, features: Features, trunk: Trunk, options: FitOptions, progress: Report
) -> _Outcome:
    torch.manual_seed(options.seed)
    learner: Learner
    if options.kind == "linear":
        learner = LinearLearner(features, dataset.learn, len(dataset.labels))
    else:
        learner = VqtLearner(trunk, options.queries, len(dataset.labels))
    state = Progress("training", 0, options.epochs * (1 if options.keep == 1 else 2))

    def watch(point: Epoch) -> None:
        nonlocal state
        best = max(state.accuracy or 0.0, point.holdout_accuracy)
        state = replace(state, done=point.epoch, accuracy=best)

    training = Training(
        learner,
        features,
        dataset.targets,
        dataset.learn,
        dataset.held,
        options,
        trunk.placement.device,
        watch,
        lambda: progress(state),
    )
    indices, best = _train_and_select(training, learner, options)
    return _Outcome(learner, indices, best, training.curve, training.predict(indices))


def _train_and_select(
    training: Training, learner: Learner, options: FitOptions
) -> tuple[Tensor | None, Epoch]:
    """Train. If `options.keep` is below 1, train again on the strongest features."""
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
    """The learner's weights, named as in a head's file. The scaling of linear features is folded
    into the classifier."""
    weight = learner.classifier.weight.detach()
    bias = learner.classifier.bias.detach()
    tensors = learner.tensors()
    if isinstance(learner, LinearLearner):
        mean, std = learner.mean, learner.std
        if indices is not None:  # a linear head takes all features: the others get weight 0
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


def _details(dataset: Dataset, outcome: _Outcome) -> dict[str, Any]:
    """The parts of the report that are not in the head's summary."""
    classes = len(dataset.labels)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (dataset.targets[dataset.held], outcome.predicted), 1)
    return {
        "images_by_class": dict(Counter(example.label for example in dataset.readable)),
        "skipped": dataset.skipped,
        "holdout": [dataset.readable[i].name for i in dataset.held],
        "labels": dataset.labels,
        "confusion": confusion.tolist(),
        "curve": curve_rows(outcome.curve),
    }


def _batches(positions: list[int]) -> list[list[int]]:
    return [positions[start : start + BATCH] for start in range(0, len(positions), BATCH)]
