"""Images that a generator draws."""

import io
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from PIL import Image
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.heads.base import Head
from models.reference_outputs import Parts, network_of
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput


class Generate(Head):
    kind = "generate"
    task = "generate"
    forward_is_slow = True
    finish_is_slow = True

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        return cls()

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return {"image": output.features}

    def finish(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`size` (2,) width and height; `png` the image, with values clipped to 0..1."""
        image = Image.fromarray(to_pixels(row["image"]))
        return {"size": np.array(image.size), "png": encode_png(image)}

    def reference_outputs(self, parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`style` (B, D) and `images` of `latent` (B, D) without noise; with `noise_0` and so on,
        one tensor per layer, `images_noised` too."""
        trunk = parts.trunk
        latent = inputs["latent"].to(trunk.placement.device, trunk.placement.dtype)
        network = network_of(trunk)
        named = {"style": network.style(latent), "images": network(latent)}
        noise = [inputs[name] for i in range(len(trunk.preprocess.noise))
                 if (name := f"noise_{i}") in inputs]  # fmt: skip
        noise = noise or list(inputs.get("noise", ()))
        if noise:
            named["images_noised"] = network(latent, [each.to(latent) for each in noise])
        return named


def to_pixels(image_CHW: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 of values within 0..1."""
    scaled = np.rint(np.clip(image_CHW, 0, 1) * 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))


def encode_png(image: Image.Image) -> np.ndarray:
    """The PNG's bytes, (N,) uint8."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)
