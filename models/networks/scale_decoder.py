"""Scale-MAE's decoder (arXiv 2212.14532, github.com/bair-climate-initiative/scale-mae).

A transformer and a two-level pyramid: the fine level predicts high frequencies at twice the input's
size, the coarse level predicts low frequencies at the input's size. Module names are the
checkpoint's.
"""

from functools import partial
from typing import NamedTuple

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.networks.masked import Visible
from models.networks.scale_vit import ground_positions

NORM_EPS = 1e-6


class Drawn(NamedTuple):
    """The predicted images.

    Args:
        low: low frequencies, (B, 3, H, W).
        high: high frequencies, (B, 3, 2H, 2W).
        combined: their sum, (B, 3, 2H, 2W).
    """

    low: Tensor
    high: Tensor
    combined: Tensor


class Norm2d(nn.Module):
    """A layer norm over the channels of (B, C, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = LayerNorm2d(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.ln(x)
        return normed


class Pyramid(nn.Module):
    """A grid (B, C, h, w) upsampled by 4 and by 2. A `progressive` one begins the former with the
    latter."""

    def __init__(self, dim: int, *, progressive: bool = False) -> None:
        super().__init__()
        double = partial(nn.ConvTranspose2d, dim, dim, 2, stride=2)
        first = () if progressive else (double(),)
        self.progressive = progressive
        self.fpn1 = nn.Sequential(*first, Norm2d(dim), nn.GELU(), double())
        self.fpn2 = nn.Sequential(double())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        coarse = self.fpn2(x)
        return self.fpn1(coarse if self.progressive else x), coarse


class ConvBlock(nn.Module):
    """Two convolutions behind activations, with a 1x1 convolution as their shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.convs = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(dim, half, 3, padding=1, groups=half),
            nn.GELU(),
            nn.Conv2d(half, dim, 1),
        )
        self.residual = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.convs(x) + self.residual(x)
        return summed


class ConvHead(nn.Module):
    """A grid (B, C, h, w) to pixels (B, 3, 8h, 8w)."""

    def __init__(self, inputs: int, dim: int, layers: int) -> None:
        super().__init__()
        half, quarter = dim // 2, dim // 4
        self.proj = nn.Conv2d(inputs, dim, 1)
        self.conv_blocks = nn.Sequential(*(ConvBlock(dim) for _ in range(layers)))
        self.pred = nn.Sequential(
            Norm2d(dim),
            nn.ConvTranspose2d(dim, half, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(half, quarter, 3, padding=1, groups=quarter),
            nn.GELU(),
            nn.Conv2d(quarter, half, 1),
            nn.GELU(),
            nn.ConvTranspose2d(half, 3, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        pixels: Tensor = self.pred(self.conv_blocks(self.proj(x)))
        return pixels


class ScaleDecoder(nn.Module):
    """Decodes all patches, without the class token.

    Args:
        width: channels of the encoder.
        dim: channels of the decoder's transformer, of `depth` blocks with `heads` heads each.
        fcn_dim: channels of the convolutional heads.
        fcn_layers: blocks of each convolutional head.
        shared: both pyramid levels use one convolutional head.
        band: side in pixels that the low-frequency image is reduced to.
        progressive: see `Pyramid`.
    """

    def __init__(
        self, *, width: int, dim: int, depth: int, heads: int, fcn_dim: int, fcn_layers: int,
        shared: bool, band: int, progressive: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.band = band
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_embed = nn.Linear(width, dim)
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        blocks = [Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = norm(dim)
        self.fpn = Pyramid(dim, progressive=progressive)
        if shared:
            self.fcn = ConvHead(dim, fcn_dim, fcn_layers)
        else:
            self.fcn_high = ConvHead(dim, fcn_dim, fcn_layers)
            self.fcn_low = ConvHead(dim, fcn_dim, fcn_layers)

    def forward(self, visible: Visible, input_res: Tensor) -> Drawn:
        """`input_res` (B,) is the same as in `ScaleVit.forward_features`."""
        patches = self.decoder_embed(visible.latent)[:, 1:]
        batch, count = visible.restore.shape
        masked = self.mask_token.expand(batch, count - patches.shape[1], -1)
        shuffled = torch.cat([patches, masked], 1)
        dim, side = shuffled.shape[-1], round(count**0.5)
        x = shuffled.gather(1, visible.restore[..., None].expand(-1, -1, dim))
        x = x + ground_positions(input_res, side, side, dim)
        x = self.decoder_norm(self.decoder_blocks(x))
        fine, coarse = self.fpn(x.transpose(1, 2).reshape(batch, dim, side, side))
        high = (self.fcn if hasattr(self, "fcn") else self.fcn_high)(fine)
        low = (self.fcn if hasattr(self, "fcn") else self.fcn_low)(coarse)
        reduced = interpolate(low, size=(self.band, self.band), mode="area")
        raised = interpolate(reduced, size=high.shape[-2:], mode="bilinear", align_corners=False)
        return Drawn(low, high, high + raised)
