"""Trunks that turn latent vectors into images: generators."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.trunks.base import ClosedTrunk, Placement, TrunkOutput, state_digest
from models.trunks.features import NOTHING, Need


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a generator takes of one image: `latent_dim` numbers, then those of its noise, whose
    tensors have the shapes `noise`."""

    latent_dim: int
    noise: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def noise_count(self) -> int:
        """How many numbers the noise of one image has."""
        return sum(map(math.prod, self.noise))

    def of_seed(self, seed: int) -> Tensor:
        """An input drawn from the normal distribution: the same one for the same seed."""
        random = torch.Generator().manual_seed(seed)
        return torch.randn(self.latent_dim + self.noise_count, generator=random)

    def of_latent(self, latent: Tensor) -> Tensor:
        """An input of that latent vector, without noise."""
        return torch.cat([latent, torch.zeros(self.noise_count)])


class Generator(ClosedTrunk):
    """A network that gives images (B, 3, H, W), nominally within 0..1, for such inputs."""

    modality = "latent"

    def __init__(self, architecture: str, network: Any, placement: Placement) -> None:
        self.architecture = architecture
        shapes = tuple(tuple(shape) for shape in network.noise_shapes)
        self.preprocess = LatentSpec(network.latent_dim, shapes)
        self.digest = state_digest(network.state_dict())
        self.network: Any = placement.apply(network)
        self.placement = placement

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        batch = torch.stack(list(inputs))
        return batch.pin_memory() if pin_memory else batch

    def blank(self) -> Tensor:
        return self.preprocess.of_seed(0)

    def forward(self, batch: Tensor, need: Need = NOTHING) -> TrunkOutput:
        batch = batch.to(self.placement.device, self.placement.dtype, non_blocking=True)
        spec = self.preprocess
        sizes = [spec.latent_dim, *map(math.prod, spec.noise)]
        latent, *flat = torch.split(batch, sizes, 1)
        noise = [
            numbers.reshape(-1, *shape[1:]) for numbers, shape in zip(flat, spec.noise, strict=True)
        ]
        images = self.network(latent, noise)
        return TrunkOutput(images, 0, images.shape[-2:])

    def pool(self, output: TrunkOutput) -> Tensor:
        raise NotImplementedError("a generator embeds nothing")


def is_generator(network: nn.Module) -> bool:
    """Whether a network takes latent vectors."""
    return hasattr(network, "latent_dim")
