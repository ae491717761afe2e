"""Trunks of masked autoencoders: they can encode some of the patches alone."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.networks.masked import Visible, encode_placed, encode_visible
from models.networks.scale_vit import ScaleVit, ground_positions
from models.trunks.output import TrunkOutput
from models.trunks.timm import TimmTrunk


class MaskedTrunk(TimmTrunk):
    """A ViT with a table of positions: MAE (arXiv 2111.06377), SupMAE, SdMAE."""

    def encode_visible(
        self, pixels: Tensor, noise_BN: Tensor, ratio: float, scale: Tensor | None = None
    ) -> Visible:
        """Encode the patches with the least noise.

        Args:
            pixels: (B, 3, H, W), normalised.
            noise_BN: a number per patch.
            ratio: the share of patches that stays hidden.
            scale: see `ScaleMaeTrunk`.
        """
        return encode_visible(self.network, pixels, noise_BN, ratio)

    def scales(self, scale: Tensor | None, like: Tensor) -> Tensor:
        """(B,) scales that positions are computed for; 1 where features do not depend on them."""
        return like.new_ones(len(like))


class ScaleMaeTrunk(MaskedTrunk):
    """Scale-MAE (arXiv 2212.14532), whose positions are scaled by the ground that a pixel covers.

    `scale` (B,) is what upstream calls `input_res`: metres per pixel of the input, relative to
    what the model calls 1. None is 1 for all.
    """

    network: ScaleVit
    takes_gsd = True

    def forward_at_scale(self, output: TrunkOutput, scale: Tensor) -> TrunkOutput:
        """The output for pixels of other scales (B,), from an output that has `pixels`."""
        assert output.pixels is not None
        features = self.network.forward_features(output.pixels, scale)
        return replace(output, features=features, prefix=self.num_prefix_tokens)

    def encode_visible(
        self, pixels: Tensor, noise_BN: Tensor, ratio: float, scale: Tensor | None = None
    ) -> Visible:
        patches: Any = self.network.patch_embed(pixels)
        _, rows, columns, dim = patches.shape
        table = ground_positions(self.scales(scale, patches), rows, columns, dim)
        table = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
        return encode_placed(self.network, patches.flatten(1, 2), table, noise_BN, ratio)

    def scales(self, scale: Tensor | None, like: Tensor) -> Tensor:
        return self.network.scales(scale, like)
