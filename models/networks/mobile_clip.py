"""MobileCLIP's towers that open_clip does not have, or has otherwise (arXiv 2311.17049,
github.com/apple/ml-mobileclip). Their names are those of open_clip and timm, as far as these have
them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from models.networks.open_clip import image_tower, text_tower

EPS = 1e-5


class Branches(nn.Module):
    """The sum of a batch norm and, unless `plain`, of a depthwise convolution with one."""

    def __init__(self, dim: int, kernel: int, *, plain: bool) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(dim)
        self.rbr_conv = nn.ModuleList([] if plain else [Depthwise(dim, kernel)])

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.rbr_skip(x)
        for branch in self.rbr_conv:
            summed = summed + branch(x)
        return summed


class Depthwise(nn.Module):
    """A depthwise convolution along a row, and a batch norm."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            dim, dim, (1, kernel), padding=(0, kernel // 2), groups=dim, bias=False
        )
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(x))
        return normed


class TokenMixer(nn.Module):
    """Mixes neighbouring tokens: two sums of branches, of which the second is subtracted."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.mixer = Branches(dim, kernel, plain=False)
        self.norm = Branches(dim, kernel, plain=True)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return mixed


class ConvMlp(nn.Module):
    """A depthwise convolution, and an MLP on each token."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = Depthwise(dim, kernel)
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.fc2(gelu(self.fc1(self.conv(x))))
        return mapped


class MixerBlock(nn.Module):
    """A block of convolutions among a text transformer's, on tokens (B, T, D)."""

    def __init__(self, dim: int, kernel: int = 11) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(dim, kernel)
        self.convffn = ConvMlp(dim, kernel)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def get_weight_dtype(self) -> torch.dtype:
        """As open_clip asks the first block of a transformer."""
        return self.layer_scale.dtype

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        rows = self.token_mixer(x.transpose(1, 2).unsqueeze(2))
        rows = rows + self.layer_scale * self.convffn(rows)
        tokens: Tensor = rows.squeeze(2).transpose(1, 2)
        return tokens


def mixed_text(*, embed_dim: int, quick_gelu: bool, config: Mapping[str, Any]) -> nn.Module:
    """The text tower of S0: open_clip's, between two blocks of convolutions."""
    tower: Any = text_tower(embed_dim=embed_dim, quick_gelu=quick_gelu, config=config)
    blocks = tower.transformer.resblocks
    blocks.insert(0, MixerBlock(tower.width))
    blocks.append(MixerBlock(tower.width))
    return tower  # type: ignore[no-any-return]


def apples_vit(*, embed_dim: int, quick_gelu: bool, config: Mapping[str, Any]) -> nn.Module:
    """The image tower of B: timm's, whose stem does not pad and whose epsilons are others."""
    tower: Any = image_tower(embed_dim=embed_dim, quick_gelu=quick_gelu, config=config)
    tower.trunk.patch_embed.backbone.get_submodule("0").conv.padding = (1, 1)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = EPS
    return tower  # type: ignore[no-any-return]


NETWORKS = {"mobile-clip-b-image": apples_vit, "mobile-clip-s0-text": mixed_text}
