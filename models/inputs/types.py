"""What a model may be asked about. Needs no torch.

An encoded image is bytes, one already preprocessed a (3, H, W) float32 array, normalised; a text is
a string.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Video:
    """An encoded clip."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Seed:
    """What a generator's latent vector and noise are drawn from."""

    value: int


@dataclass(frozen=True, slots=True, eq=False)
class Latent:
    """A generator's latent vector (D,), to be drawn without noise."""

    vector: np.ndarray


Input = bytes | np.ndarray | str | Video | Seed | Latent


def modality_of(item: Input) -> str:
    """`image`, `text`, `video` or `latent`."""
    match item:
        case str():
            return "text"
        case Video():
            return "video"
        case Seed() | Latent():
            return "latent"
    return "image"
