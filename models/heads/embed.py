"""Pooled features of the trunk as a retrieval embedding."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from models.errors import InputError
from models.trunk import Trunk, TrunkOutput

POOLINGS = ("cls", "mean", "max", "gem")
GEM_P = 3.0
GEM_EPS = 1e-6


class Embed:
    """`pooling` None is the checkpoint's own; the others pool the last layer's features.

    `mean`, `max` and `gem` (generalized mean, p = 3; Radenovic et al., arXiv 1711.02512) are over
    places in the image, so without class and register tokens.
    """

    task = "embed"
    forward_options = frozenset({"pooling"})
    finish_is_slow = False
    network = None

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk

    def check(self, options: Mapping[str, Any]) -> None:
        pooling = options.get("pooling")
        if pooling == "ggem":
            raise InputError(
                "pooling ggem needs exponents learned with the checkpoint; this one has none",
                field="pooling",
            )
        if pooling is not None and pooling not in POOLINGS:
            raise InputError(
                f"pooling is {pooling!r}; it can be {', '.join(POOLINGS)}", field="pooling"
            )
        if pooling is not None and not self.trunk.has_tokens:
            raise InputError(
                f"{self.trunk.architecture} yields one embedding; leave pooling out",
                field="pooling",
            )
        if pooling == "cls" and not getattr(self.trunk.network, "num_prefix_tokens", 0):
            raise InputError(
                f"pooling cls needs a class token; {self.trunk.architecture} has none",
                field="pooling",
            )

    def forward(self, output: TrunkOutput, *, pooling: str | None = None) -> dict[str, Tensor]:
        return {"embedding": self._pool(output, pooling)}

    def _pool(self, output: TrunkOutput, pooling: str | None) -> Tensor:
        match pooling:
            case "cls":
                return output.tokens_BTD[:, 0]
            case "mean":
                return output.patches_BTD.mean(1)
            case "max":
                return output.patches_BTD.amax(1)
            case "gem":
                clamped = output.patches_BTD.clamp(min=GEM_EPS)
                return clamped.pow(GEM_P).mean(1).pow(1 / GEM_P)
        return self.trunk.pool(output)

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], *, normalize: bool = True
    ) -> dict[str, np.ndarray]:
        """`embedding` (D,) float32, of unit length if `normalize`."""
        embedding = row["embedding"]
        if normalize:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        return {"embedding": embedding}
