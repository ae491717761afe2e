"""What heads over fixed classes share: logits in, the best classes by probability out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from models.heads.base import Head
from models.tasks.classify import DEFAULT_TOP_K


class Ranking(Head):
    """A subclass has `forward`, which returns `logits` (B, labels)."""

    task = "classify"

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self._labels = np.array(labels)

    def check(self, options: Mapping[str, Any]) -> None:
        top_k = options.get("top_k")
        if top_k is not None and not 1 <= top_k <= len(self.labels):
            raise InputError(
                f"top_k is {top_k}; this model has {len(self.labels)} classes", field="top_k"
            )

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], *, top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """`index` (k,) int64, `label` (k,) str, `score` (k,) float32, best first."""
        logits = row["logits"]
        exponents = np.exp(logits - logits.max())
        scores = exponents / exponents.sum()
        index = best(scores, min(top_k or DEFAULT_TOP_K, len(scores)))
        return {"index": index, "label": self._labels[index], "score": scores[index]}


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` highest scores, best first; of equal ones the lower index first.

    The same as the start of a stable sort, without sorting the other classes, which takes
    milliseconds for 21 thousand of them.
    """
    least = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(~(scores < least))  # all of them if some are NaN
    order = np.argsort(-scores[candidates], kind="stable")
    index: np.ndarray = candidates[order[:count]]
    return index
