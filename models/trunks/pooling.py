"""Poolings of patch tokens (B, T, D) to (B, D)."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from models.errors import CheckpointError

GEM_P = 3.0
GEM_EPS = 1e-6


def gem(patches_BTD: Tensor, p: float = GEM_P) -> Tensor:
    """Generalized mean (Radenovic et al., arXiv 1711.02512)."""
    return patches_BTD.clamp(min=GEM_EPS).pow(p).mean(1).pow(1 / p)


def ggem(patches_BTD: Tensor, exponents_G: Tensor) -> Tensor:
    """Group generalized mean (arXiv 2212.04114): G contiguous groups of channels with an exponent
    each. Computed in logarithms, since eps ** p underflows in float32 for p above 6.

    Raises:
        CheckpointError: the groups do not divide the channels.
    """
    tokens, dim = patches_BTD.shape[1:]
    if dim % len(exponents_G):
        raise CheckpointError(f"{len(exponents_G)} groups do not divide {dim} channels")
    p_D = exponents_G.repeat_interleave(dim // len(exponents_G))
    logs = patches_BTD.float().clamp(min=GEM_EPS).log() * p_D
    mean = logs.logsumexp(1) - math.log(tokens)
    return (mean / p_D).exp()


class Projection(nn.Module):
    """A projection after the pooling: (x - mean) @ weight, (B, D) to (B, E)."""

    mean: Tensor
    weight: Tensor

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("weight", weight)

    def forward(self, x_BD: Tensor) -> Tensor:
        projected: Tensor = (x_BD - self.mean) @ self.weight
        return projected


def pca_projection(weights: Mapping[str, Tensor]) -> Projection:
    """A principal component analysis: `mean` (D,), `components` (E, D)."""
    return Projection(weights["mean"], weights["components"].T.contiguous())
