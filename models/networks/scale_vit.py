"""Scale-MAE's ViT (arXiv 2212.14532, github.com/bair-climate-initiative/scale-mae).

Positions are scaled by the ground sample distance (GSD) of the image.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.networks.vit import Patches

TEMPERATURE = 10_000


class ScaleVit(VisionTransformer):  # type: ignore[misc]
    """A ViT with sine-cosine positions of the patch's column and row times the image's scale.

    The position table in its checkpoints is not used.
    """

    def __init__(self, *, absolute_scale: bool = False, **arguments: Any) -> None:
        """
        Args:
            absolute_scale: the network was trained with every scale set to 1.
        """
        self.absolute_scale = absolute_scale
        super().__init__(dynamic_img_size=True, pos_embed="none", embed_layer=Patches, **arguments)

    def forward_features(self, x: Tensor, input_res: Tensor | None = None) -> Tensor:
        """Tokens after the norm, (B, T, D).

        Args:
            x: (B, 3, H, W).
            input_res: (B,) ground covered by a pixel, relative to the model's unit; None is 1.
        """
        patches = self.patch_embed(x)
        batch, rows, columns, dim = patches.shape
        table = ground_positions(self.scales(input_res, patches), rows, columns, dim)
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), patches.flatten(1, 2)], 1)
        tokens[:, 1:] = tokens[:, 1:] + table
        normed: Tensor = self.norm(self.blocks(tokens))
        return normed

    def scales(self, input_res: Tensor | None, batch: Tensor) -> Tensor:
        """The scales (B,) that positions use: 1 by default and for `absolute_scale` networks."""
        if input_res is None or self.absolute_scale:
            return batch.new_ones(batch.shape[0])
        return input_res.to(batch)


def ground_positions(input_res: Tensor, rows: int, columns: int, dim: int) -> Tensor:
    """Sine-cosine positions (B, rows * columns, dim).

    The first half of the channels encodes the column, the second half the row; each half has the
    sines first, then the cosines.
    """
    quarter = dim // 4
    steps = torch.arange(quarter, dtype=torch.float64, device=input_res.device) / quarter
    frequencies = 1.0 / TEMPERATURE**steps
    down, across = torch.meshgrid(
        torch.arange(rows, device=input_res.device),
        torch.arange(columns, device=input_res.device),
        indexing="ij",
    )
    parts = []
    for axis in (across, down):
        places = input_res.double()[:, None] * axis.flatten().double()[None]
        angles = places[..., None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, -1).to(input_res.dtype)


NETWORKS = {"scale-vit": ScaleVit}
