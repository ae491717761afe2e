"""Training of a head's weights on features of a frozen trunk."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from models.fitting.features import Features
from models.fitting.options import FitOptions
from models.heads.vqt import vqt_features
from models.trunks.attention import finish_block, project
from models.trunks.base import Trunk

QUERY_DROPOUT = 0.1


@dataclass(frozen=True, slots=True)
class Epoch:
    """One point of the learning curve."""

    epoch: int
    train_loss: float
    train_accuracy: float
    holdout_loss: float
    holdout_accuracy: float


Watch = Callable[[Epoch], None]


class Learner(nn.Module):
    """The trainable part of a head: features, computed from stored rows, and a classifier."""

    classifier: nn.Linear

    def features(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The features (B, F) of stored rows."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The weights, named as in a head's file, without the classifier's."""
        raise NotImplementedError


class LinearLearner(Learner):
    """The stored features, standardised by the training examples' mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: Features, learn: np.ndarray, classes: int) -> None:
        super().__init__()
        sums = [(rows := features.rows(some)["features"], rows.square()) for some in _runs(learn)]
        count = len(learn)
        mean = torch.stack([rows.sum(0) for rows, _ in sums]).sum(0) / count
        square = torch.stack([squares.sum(0) for _, squares in sums]).sum(0) / count
        self.register_buffer("mean", mean)
        self.register_buffer("std", (square - mean.square()).clamp(min=1e-8).sqrt())
        self.classifier = _zero_linear(len(mean), classes)

    def features(self, rows: Mapping[str, Tensor]) -> Tensor:
        return (rows["features"] - self.mean) / self.std

    def tensors(self) -> dict[str, Tensor]:
        return {}


class VqtLearner(Learner):
    """Query tokens that attend to each block's keys and values; see `trunks/query_tokens.py`."""

    def __init__(self, trunk: Trunk, queries: int, classes: int) -> None:
        super().__init__()
        depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
        self._trunk = [trunk]  # in a list, so that its parameters are not trained
        rows, columns = trunk.patch_size
        bound = math.sqrt(6 / (3 * rows * columns + dim))  # upstream's initialisation
        self.queries = nn.Parameter(torch.empty(depth, queries, dim).uniform_(-bound, bound))
        self.classifier = _zero_linear(dim * (1 + depth * queries), classes)
        self._dtype = trunk.placement.dtype

    def features(self, rows: Mapping[str, Tensor]) -> Tensor:
        pooled_BD, stored = rows["pooled"], rows["keys_values"]
        outputs = []
        for number, block in enumerate(self._trunk[0].blocks):
            # contiguous, so that matrix products do not copy them again
            keys, values = (stored[:, number, i].to(self._dtype).contiguous() for i in (0, 1))
            raw_TD = dropout(self.queries[number], QUERY_DROPOUT, self.training).to(self._dtype)
            queries = project(block, raw_TD).expand(len(keys), -1, -1, -1)
            context = _read(block.attn.scale * queries, keys, values)
            outputs.append(finish_block(block, raw_TD.expand(len(keys), -1, -1), context))
        return vqt_features(pooled_BD, torch.stack(outputs, 1), None, True)

    def tensors(self) -> dict[str, Tensor]:
        return {"queries": self.queries.detach()}


class Training:
    """Trains a learner until the accuracy on held-out images no longer improves."""

    def __init__(
        self,
        learner: Learner,
        features: Features,
        targets: np.ndarray,
        learn: np.ndarray,
        held: np.ndarray,
        options: FitOptions,
        device: torch.device,
        watch: Watch,
        step: Callable[[], None],
    ) -> None:
        """
        Args:
            features: rows by position.
            targets: the class index of every position.
            learn: positions to train on.
            held: positions held out.
            watch: called after every epoch.
            step: called before every batch; an exception that it raises ends the training.
        """
        self._learner = learner.to(device)
        self._device = device
        self._features = features
        self._targets = torch.from_numpy(targets).to(device)
        self._learn = learn
        self._held = held
        self._options = options
        self._watch = watch
        self._step = step
        self._random = np.random.default_rng(options.seed)
        self.curve: list[Epoch] = []

    def run(self, indices: Tensor | None = None, lasso: float = 0.0) -> Epoch:
        """Train, restore the weights of the best epoch, and return that epoch.

        Args:
            indices: the features that the classifier reads; None for all.
            lasso: weight of the group lasso, the sum of the norms of the classifier's columns.
        """
        learner, options = self._learner, self._options
        optimizer = torch.optim.AdamW(
            learner.parameters(), options.rate, weight_decay=options.weight_decay
        )
        best: Epoch | None = None
        kept: dict[str, Any] = {}
        for _ in range(options.epochs):
            learner.train()
            sums = np.zeros(2)
            for positions in self._shuffled():
                self._step()
                optimizer.zero_grad()
                loss, correct = self._loss(positions, indices)
                penalty = lasso * learner.classifier.weight.norm(dim=0).sum() if lasso else 0
                torch.autograd.backward(loss + penalty)
                optimizer.step()
                sums += loss.item() * len(positions), correct
            train_loss, train_accuracy = sums / len(self._learn)
            held_loss, held_accuracy = self._evaluate(indices)
            point = Epoch(len(self.curve) + 1, train_loss, train_accuracy, held_loss, held_accuracy)
            self.curve.append(point)
            self._watch(point)
            if best is None or _better(point, best):
                best = point
                kept = {name: value.clone() for name, value in learner.state_dict().items()}
            elif point.epoch - best.epoch >= options.patience:
                break
        assert best is not None
        learner.load_state_dict(kept)
        return best

    def predict(self, indices: Tensor | None) -> np.ndarray:
        """The predicted class index of each held-out image, (held,)."""
        self._learner.eval()
        with torch.no_grad():
            return np.concatenate(
                [self._logits(some, indices).argmax(-1).cpu().numpy() for some in _runs(self._held)]
            )

    def _shuffled(self) -> Iterator[list[int]]:
        order = self._random.permutation(self._learn)
        size = self._options.batch_size
        for start in range(0, len(order), size):
            yield sorted(order[start : start + size].tolist())

    def _logits(self, positions: Sequence[int], indices: Tensor | None) -> Tensor:
        rows = self._features.rows(positions)
        on_device = {name: tensor.to(self._device) for name, tensor in rows.items()}
        features_BF = self._learner.features(on_device)
        selected = features_BF if indices is None else features_BF[:, indices]
        logits_BK: Tensor = self._learner.classifier(selected)
        return logits_BK

    def _loss(self, positions: Sequence[int], indices: Tensor | None) -> tuple[Tensor, int]:
        logits = self._logits(positions, indices)
        targets = self._targets[list(positions)]
        return cross_entropy(logits, targets), int((logits.argmax(-1) == targets).sum())

    def _evaluate(self, indices: Tensor | None) -> tuple[float, float]:
        self._learner.eval()
        loss, correct = 0.0, 0
        with torch.no_grad():
            for positions in _runs(self._held):
                some, right = self._loss(positions, indices)
                loss += some.item() * len(positions)
                correct += right
        return loss / len(self._held), correct / len(self._held)


def _read(queries_BThd: Tensor, keys_BhKd: Tensor, values_BhKd: Tensor) -> Tensor:
    """`models.trunks.attention.attend` with gradients for the queries alone.

    That is much less work than the backward pass of fused attention kernels.
    """
    scores = queries_BThd.transpose(1, 2) @ keys_BhKd.transpose(-2, -1)
    context = scores.softmax(-1) @ values_BhKd
    return context.transpose(1, 2).flatten(2)


def _better(point: Epoch, best: Epoch) -> bool:
    """Whether an epoch is better: by holdout accuracy, then by holdout loss."""
    score = (point.holdout_accuracy, -point.holdout_loss)
    return score > (best.holdout_accuracy, -best.holdout_loss)


def _runs(positions: np.ndarray, size: int = 64) -> Iterator[list[int]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size].tolist()


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def curve_rows(curve: Sequence[Epoch]) -> list[dict[str, float]]:
    """The learning curve as plain values, one mapping per epoch."""
    return [asdict(point) for point in curve]
