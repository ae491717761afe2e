"""Scale-MAE's ViT (arXiv 2212.14532): positions tell how much ground lies between two patches."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.networks.vit import Patches

TEMPERATURE = 10_000


class ScaleVit(VisionTransformer):  # type: ignore[misc]
    """The table in its checkpoints is never read: positions are sines and cosines of the patch's
    column and row times the image's scale."""

    def __init__(self, *, absolute_scale: bool = False, **arguments: Any) -> None:
        """
        Args:
            absolute_scale: whether it was trained as if every scale were 1.
        """
        self.absolute_scale = absolute_scale
        super().__init__(dynamic_img_size=True, pos_embed="none", embed_layer=Patches, **arguments)

    def forward_features(self, x: Tensor, input_res: Tensor | None = None) -> Tensor:
        """(B, T, D): tokens after the norm.

        Args:
            x: (B, 3, H, W).
            input_res: (B,) how much ground a pixel covers, relative to what the model calls 1;
                None: 1 for all.
        """
        patches = self.patch_embed(x)
        batch, rows, columns, dim = patches.shape
        table = ground_positions(self.scales(input_res, patches), rows, columns, dim)
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), patches.flatten(1, 2)], 1)
        tokens[:, 1:] = tokens[:, 1:] + table
        done: Tensor = self.norm(self.blocks(tokens))
        return done

    def scales(self, input_res: Tensor | None, batch: Tensor) -> Tensor:
        """(B,) that positions are computed for: 1 where none is given, or none was trained with."""
        if input_res is None or self.absolute_scale:
            return batch.new_ones(len(batch))
        return input_res.to(batch)


def ground_positions(input_res: Tensor, rows: int, columns: int, dim: int) -> Tensor:
    """(B, rows * columns, dim): the first half of the channels for the column, the second for the
    row; of each the sines, then the cosines."""
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
