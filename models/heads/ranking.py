"""What heads over fixed classes share: logits in, the best classes by probability out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    def top_k(self, options: Mapping[str, Any]) -> int:
        return min(options.get("top_k") or DEFAULT_TOP_K, len(self.labels))

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], *, top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """`index` (k,) int64, `label` (k,) str, `score` (k,) float32, best first.

        Args:
            row: what `best_classes` returned for the row, of k classes or more.
        """
        count = self.top_k({"top_k": top_k})
        index = row["index"][:count].astype(np.int64)
        return {"index": index, "label": self._labels[index], "score": row["score"][:count]}


def best_classes(logits_BK: Tensor, count: int) -> dict[str, Tensor]:
    """`index` and `score`, float32 (B, count): the classes of the highest probabilities, best
    first; of equal ones the lower index first. Nothing waits for the device.

    `torch.topk` alone has no order among equals. So it ranks integers that are all different: the
    bits of a probability, which is not negative, are in its order, and the index follows them.
    """
    scores = logits_BK.float().softmax(-1)
    places = torch.arange(scores.shape[-1], device=scores.device)
    keys = (scores.view(torch.int32).long() << 32) - places
    index = keys.topk(count).indices
    return {"index": index.float(), "score": scores.gather(-1, index)}
