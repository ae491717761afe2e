"""Generators: trunks that turn latent vectors into images."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.inputs.numbers import to_numbers
from models.inputs.types import Seed
from models.trunks.base import Trunk
from models.trunks.devices import Placement
from models.trunks.features import PassPlan
from models.trunks.output import TrunkOutput


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a generator takes for one image: a latent vector, then the noise of every layer.

    Args:
        latent_dim: numbers of the latent vector.
        noise: shapes of the layers' noise tensors.
    """

    latent_dim: int
    noise: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def noise_count(self) -> int:
        """Numbers of one image's noise."""
        return sum(map(math.prod, self.noise))

    def of_seed(self, seed: int) -> Tensor:
        """An input from the normal distribution. The same seed gives the same input."""
        random = torch.Generator().manual_seed(seed)
        return torch.randn(self.latent_dim + self.noise_count, generator=random)

    def of_latent(self, latent: Tensor) -> Tensor:
        """An input of a latent vector (latent_dim,), without noise."""
        return torch.cat([latent, torch.zeros(self.noise_count)])


class GeneratorPass(nn.Module):
    """Inputs (B, latent_dim + noise_count) to `images` (B, 3, H, W)."""

    def __init__(self, network: nn.Module, spec: LatentSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self._spec = spec
        self._dtype = dtype

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        spec = self._spec
        sizes = [spec.latent_dim, *map(math.prod, spec.noise)]
        latent, *flat = torch.split(batch.to(self._dtype), sizes, 1)
        noise = [
            numbers.reshape(-1, *shape[1:]) for numbers, shape in zip(flat, spec.noise, strict=True)
        ]
        return {"images": self.network(latent, noise)}


class Generator(Trunk):
    """A network that draws images, nominally within 0..1."""

    modality = "latent"
    preprocess: LatentSpec

    def __init__(self, architecture: str, network: Any, placement: Placement) -> None:
        shapes = tuple(tuple(shape) for shape in network.noise_shapes)
        super().__init__(architecture, network, LatentSpec(network.latent_dim, shapes), placement)

    def create_pass(self, plan: PassPlan) -> nn.Module:
        return GeneratorPass(self.network, self.preprocess, self.placement.dtype)

    def output(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> TrunkOutput:
        images = tensors["images"]
        return TrunkOutput(images, 0, (images.shape[2], images.shape[3]))

    def prepare(self, item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        """A `Seed` or a `Latent` as the numbers of one image, (latent_dim + noise_count,)."""
        spec = self.preprocess
        if isinstance(item, Seed):
            return spec.of_seed(item.value)
        return spec.of_latent(to_numbers("latent", item.vector, (spec.latent_dim,)))

    def blank(self) -> Tensor:
        return self.preprocess.of_seed(0)

    def samples(self, count: int) -> list[Tensor]:
        return [self.preprocess.of_seed(seed) for seed in range(count)]
