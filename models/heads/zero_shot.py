"""Labels made up by the caller, scored by how close their texts come to the image.

Softmax of scaled cosine similarities (CLIP, arXiv 2103.00020), or a sigmoid each (SigLIP, arXiv
2303.15343), whose checkpoints bring a bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from models.heads.base import BaseHead
from models.heads.embed import Embed
from models.heads.prompted import Prompted
from models.trunks.base import TrunkOutput


class ZeroShot(Prompted, BaseHead):
    task = "zero-shot"

    def __init__(
        self,
        embed: Embed,
        scale: float,
        bias: float | None,
        templates: Sequence[str],
        labels: Sequence[str] = (),
    ) -> None:
        self.embed = embed
        self.network = embed.network
        self.scale = scale
        self.bias = bias
        self.templates = tuple(templates)
        self.labels = tuple(labels)

    def check(self, options: Mapping[str, Any]) -> None:
        self.check_prompt(options)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return self.embed.forward(output)

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        classes: np.ndarray,
        labels: Sequence[str],
        multi_label: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """All labels, best first: `index` (k,) int64, `label` (k,) str, `score` (k,) float32.

        Args:
            classes: (k, D) embeddings of the labels, of unit length.
            multi_label: a sigmoid each instead of a softmax over all; None: as trained.
        """
        image = self.embed.finish(row, size)["embedding"]
        logits = self.scale * (classes @ image) + (self.bias or 0.0)
        sigmoid = self.bias is not None if multi_label is None else multi_label
        scores = _sigmoid(logits) if sigmoid else _softmax(logits)
        index = np.argsort(-logits, kind="stable")
        return {
            "index": index,
            "label": np.array(labels)[index],
            "score": scores[index].astype(np.float32),
        }


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max())
    return np.asarray(exponents / exponents.sum())


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -60, 60))))
