"""Masked autoencoding (MAE, arXiv 2111.06377): encode the visible patches, decode all of them.

Shape suffixes: B batch, C channels, H W pixels, N patches, V visible patches, D channels of
a token, P pixel values of a patch.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

_norm = partial(nn.LayerNorm, eps=1e-6)


class Visible(NamedTuple):
    """The encoder's output for the visible patches.

    Args:
        latent: (B, 1 + V, D), class token first, patches in the shuffled order.
        restore: (B, N) indices that undo the shuffle.
        mask: (B, N), 1 for removed patches, 0 for visible ones.
    """

    latent: Tensor
    restore: Tensor
    mask: Tensor


def encode_visible(network: Any, pixels_BCHW: Tensor, noise_BN: Tensor, ratio: float) -> Visible:
    """Encode the patches with the least noise; the network has a table of positions.

    Args:
        noise_BN: a random number per patch.
        ratio: the share of patches that is removed.
    """
    patches = network.patch_embed(pixels_BCHW)
    grid = patches.shape[1:3] if patches.dim() == 4 else network.patch_embed.grid_size
    return encode_placed(network, patches.flatten(1, -2), network.positions(grid), noise_BN, ratio)


def encode_placed(
    network: Any, x: Tensor, table: Tensor, noise_BN: Tensor, ratio: float
) -> Visible:
    """As `encode_visible`, from embedded patches.

    Args:
        x: (B, N, D) patches without positions.
        table: positions (1 or B, 1 + N, D), class token first.
    """
    batch, count, dim = x.shape
    x = x + table[:, 1:]
    shuffled = noise_BN.argsort(1)
    restore = shuffled.argsort(1)
    kept = shuffled[:, : int(count * (1 - ratio))]
    x = x.gather(1, kept[..., None].expand(-1, -1, dim))
    first = (network.cls_token + table[:, :1]).expand(batch, -1, -1)
    latent = network.norm(network.blocks(torch.cat([first, x], 1)))
    mask = torch.ones(batch, count, device=x.device)
    mask[:, : kept.shape[1]] = 0
    return Visible(latent, restore, mask.gather(1, restore))


class MaskedDecoder(nn.Module):
    """MAE's decoder: (B, N, P) pixels of every patch, by row, column and channel.

    Module names are the checkpoint's.
    """

    def __init__(
        self, width: int, dim: int, depth: int, heads: int, patches: int, pixels: int
    ) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim))
        blocks = [Block(dim, heads, qkv_bias=True, norm_layer=_norm) for _ in range(depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = _norm(dim)
        self.decoder_pred = nn.Linear(dim, pixels)

    def forward(self, visible: Visible) -> Tensor:
        x = self.decoder_embed(visible.latent)
        first, patches = x[:, :1], x[:, 1:]
        missing = visible.restore.shape[1] - patches.shape[1]
        shuffled = torch.cat([patches, self.mask_token.expand(x.shape[0], missing, -1)], 1)
        places = visible.restore[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([first, shuffled.gather(1, places)], 1) + self.decoder_pos_embed
        pixels: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return pixels[:, 1:]


def patchify(pixels_BCHW: Tensor, patch: int) -> Tensor:
    """Images to patches (B, N, patch * patch * 3), each by row, column and channel."""
    rows = pixels_BCHW.unfold(2, patch, patch).unfold(3, patch, patch)
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches_BNP: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Patches back to images (B, 3, H, W); `size` is (H, W)."""
    rows, columns = size[0] // patch, size[1] // patch
    split = patches_BNP.reshape(-1, rows, columns, patch, patch, 3)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * patch, columns * patch)


def patch_statistics(patches_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of each patch, as `norm_pix_loss` normalises by."""
    variance, mean = torch.var_mean(patches_BNP, -1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def drawing_loss(drawn: Tensor, pixels_BCHW: Tensor, mask_BN: Tensor, by_patch: bool) -> Tensor:
    """Mean squared error on the removed patches, (1,).

    Args:
        drawn: (B, N, P) predicted patches.
        by_patch: the target is each patch normalised to its own mean and deviation.
    """
    side = round((drawn.shape[-1] / 3) ** 0.5)
    target = patchify(pixels_BCHW, side)
    if by_patch:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    error = (drawn - target).square().mean(-1)
    return ((error * mask_BN).sum() / mask_BN.sum())[None]
