"""The classifier that came with the checkpoint: logits, and the best classes by probability."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from models.errors import CatalogError, InputError
from models.trunk import Trunk, TrunkOutput

DEFAULT_TOP_K = 5


class Classify:
    task = "classify"
    forward_options: frozenset[str] = frozenset()
    finish_is_slow = False
    is_prompted = False
    network = None

    def __init__(self, trunk: Trunk, labels: tuple[str, ...]) -> None:
        if trunk.num_classes == 0:
            raise CatalogError(f"{trunk.architecture} was loaded without a classifier")
        if len(labels) != trunk.num_classes:
            raise CatalogError(
                f"{len(labels)} labels for a classifier of {trunk.num_classes} classes"
            )
        self.trunk = trunk
        self.labels = np.array(labels)

    def check(self, options: Mapping[str, Any]) -> None:
        top_k = options.get("top_k")
        if top_k is not None and not 1 <= top_k <= len(self.labels):
            raise InputError(
                f"top_k is {top_k}; this model has {len(self.labels)} classes", field="top_k"
            )

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return {"logits": self.trunk.classify(output)}

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], *, top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """`index` (k,) int64, `label` (k,) str, `score` (k,) float32, best first."""
        logits = row["logits"]
        exponents = np.exp(logits - logits.max())
        scores = exponents / exponents.sum()
        count = min(top_k or DEFAULT_TOP_K, len(scores))
        index = np.argsort(-scores, kind="stable")[:count]
        return {"index": index, "label": self.labels[index], "score": scores[index]}
