"""Pooled features of a trunk as a retrieval embedding."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from models.errors import InputError
from models.heads.base import BaseHead
from models.trunks.base import Trunk, TrunkOutput
from models.trunks.pooling import gem, ggem

POOLINGS = ("cls", "mean", "max", "gem", "ggem")


class Projection(nn.Module):
    """What follows the pooling: (x - mean) @ weight, to other dimensions; PCA is one."""

    mean: Tensor
    weight: Tensor

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("weight", weight)

    def forward(self, x_BD: Tensor) -> Tensor:
        projected: Tensor = (x_BD - self.mean) @ self.weight
        return projected


def pca(weights: Mapping[str, Tensor]) -> Projection:
    """A principal component analysis: `mean` (D,), `components` (K, D)."""
    return Projection(weights["mean"], weights["components"].T.contiguous())


class Embed(BaseHead):
    """`pooling` None is the checkpoint's own; the others pool the last layer's features.

    `mean`, `max`, `gem` (generalized mean, p = 3; Radenovic et al., arXiv 1711.02512) and `ggem`
    (one learned p a group of channels; arXiv 2212.04114) are over places in the image, so without
    class and register tokens.
    """

    task = "embed"
    forward_options = frozenset({"pooling"})

    def __init__(
        self,
        trunk: Trunk,
        *,
        projection: nn.Module | None = None,
        pooling: str | None = None,
    ) -> None:
        """
        Args:
            projection: what follows the pooling, (B, D) to (B, E).
            pooling: what None means in a request; None: the trunk's own.
        """
        self.trunk = trunk
        if projection is not None:
            self.network = trunk.placement.apply(projection)
        self.pooling = pooling

    def check(self, options: Mapping[str, Any]) -> None:
        if "gsd" in options:
            raise InputError("gsd is for Scale-MAE; this model knows no scale", field="gsd")
        pooling = options.get("pooling")
        if pooling is None:
            return
        problem = None
        if pooling not in POOLINGS:
            problem = f"pooling is {pooling!r}; it can be {', '.join(POOLINGS)}"
        elif not self.trunk.has_tokens:
            problem = f"{self.trunk.architecture} yields one embedding; leave pooling out"
        elif self.network is not None and pooling != self.pooling:
            problem = "this model projects its own pooling; leave pooling out"
        elif pooling == "ggem" and self.trunk.exponents is None:
            problem = "pooling ggem needs exponents learned with the checkpoint; this one has none"
        elif pooling == "cls" and not getattr(self.trunk.network, "num_prefix_tokens", 0):
            problem = f"pooling cls needs a class token; {self.trunk.architecture} has none"
        if problem is not None:
            raise InputError(problem, field="pooling")

    def forward(self, output: TrunkOutput, *, pooling: str | None = None) -> dict[str, Tensor]:
        pooled = self.pool(output, pooling or self.pooling)
        return {"embedding": pooled if self.network is None else self.network(pooled)}

    def pool(self, output: TrunkOutput, pooling: str | None) -> Tensor:
        """(B, D) by one of the poolings; None is the trunk's own."""
        match pooling:
            case "cls":
                return output.tokens_BTD[:, 0]
            case "mean":
                return output.patches_BTD.mean(1)
            case "max":
                return output.patches_BTD.amax(1)
            case "gem":
                return gem(output.patches_BTD)
            case "ggem":
                return ggem(output.patches_BTD, self.trunk.exponents)
        return self.trunk.pool(output)

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> dict[str, np.ndarray]:
        """`embedding` (D,) float32: its first `dimensions`, then of unit length if `normalize`."""
        embedding = row["embedding"]
        if dimensions is not None:
            if dimensions > len(embedding):
                raise InputError(
                    f"dimensions is {dimensions}; this model has {len(embedding)}",
                    field="dimensions",
                )
            embedding = embedding[:dimensions]
        if normalize:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        return {"embedding": embedding}
