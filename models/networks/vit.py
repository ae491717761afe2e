"""timm's ViT with the authors' ways of resizing positions and embedding patches.

Each code base resizes the position table by its own rule. All of them differ from timm's, which
uses an antialiasing filter.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame, GroupNormAct, PatchEmbed, SwiGLUPacked
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

# Stored cells (1, D, h, w) and a target grid (H, W) to cells (1, D, H, W).
Rule = Callable[[Tensor, tuple[int, int]], Tensor]


def dino_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of DINO, iBOT and SiT: bicubic by a scale factor, with 0.1 added to the grid.

    The addition moves every sampling point.
    """
    stored = cells_1Dhw.shape[-1]
    factors = tuple((side + 0.1) / stored for side in grid)
    return interpolate(cells_1Dhw, scale_factor=factors, mode="bicubic")


def bicubic_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of MAE and related code: bicubic to the target size, without antialiasing."""
    return interpolate(cells_1Dhw, size=grid, mode="bicubic", align_corners=False)


def corners_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of Google's JAX code (scipy's `zoom` of order 1): bilinear with aligned corners."""
    return interpolate(cells_1Dhw, size=grid, mode="bilinear", align_corners=True)


def by_count(mode: str) -> Rule:
    """The rule of mmsegmentation: as it is for as many cells, in whatever grid; otherwise resized
    by `mode` to the target size, without antialiasing."""

    def rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
        if cells_1Dhw[0, 0].numel() == grid[0] * grid[1]:
            return cells_1Dhw.reshape(*cells_1Dhw.shape[:2], *grid)
        return interpolate(cells_1Dhw, size=grid, mode=mode, align_corners=False)

    return rule


def antialias_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of DINOv2 with registers: bicubic to the target size, with antialiasing."""
    return interpolate(cells_1Dhw, size=grid, mode="bicubic", antialias=True)


RULES: dict[str, Rule] = {
    "antialias": antialias_rule,
    "bicubic": bicubic_rule,
    "bicubic-by-count": by_count("bicubic"),
    "bilinear-by-count": by_count("bilinear"),
    "corners": corners_rule,
    "dino": dino_rule,
}


class Patches(PatchEmbed):  # type: ignore[misc]
    """Patch embedding that ignores pixels beyond the last whole patch, as a convolution does, or
    pads the input at the bottom and on the right (timm's `dynamic_img_pad`)."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.patch_size
        if self.dynamic_img_pad:
            padded: Tensor = super().forward(x)
            return padded
        height, width = x.shape[-2:]
        whole = x[..., : height // rows * rows, : width // columns * columns]
        embedded: Tensor = super().forward(whole)
        return embedded


class CenteredPatches(Patches):
    """Patch embedding that pads the input on all sides, the odd pixel at the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.patch_size, x.shape[-2:]
        down, across = -height % rows, -width % columns
        x = pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


class ConvStem(Patches):
    """MoCo v3's convolutional stem (arXiv 2106.14881): four of stride 2, then a 1x1."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        final: Any = self.get_submodule("proj")
        layers: list[nn.Module] = []
        inputs = final.in_channels
        for divisor in (8, 4, 2, 1):
            outputs = final.out_channels // divisor
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.proj = nn.Sequential(*layers, nn.Conv2d(inputs, final.out_channels, 1))


def hybrid_stride(stages: int) -> int:
    """Pixels of a cell of a ResNet's map: 4 after its stem, twice that after each further stage
    than the first."""
    return int(4 * 2 ** max(0, stages - 1))


class HybridPatches(PatchEmbed):  # type: ignore[misc]
    """Google's hybrid embedding (arXiv 2010.11929): patches of a ResNet's map.

    The ResNet has group norms after its convolutions, and pads as TensorFlow does. Its kernels are
    standardised once, when a checkpoint is converted.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        width: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        **options: Any,
    ) -> None:
        """
        Args:
            layers: bottlenecks by stage; none for the stem alone.
            width: channels of the ResNet's stem.
            patch_size: pixels, a multiple of the ResNet's stride.
        """
        channels = [width * 4 * 2**stage for stage in range(len(layers))]
        kernel = patch_size // hybrid_stride(len(layers))
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **options)
        self.backbone = ResNetV2(
            layers=list(layers),
            channels=tuple(channels),
            num_classes=0,
            global_pool="",
            in_chans=in_chans,
            stem_chs=width,
            stem_type="same",
            preact=False,
            norm_layer=partial(GroupNormAct, num_groups=32, eps=1e-6),
            conv_layer=partial(Conv2dSame, bias=False),
        )
        self.proj = nn.Conv2d([width, *channels][-1], embed_dim, kernel, stride=kernel)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(self.backbone(x)).permute(0, 2, 3, 1)
        return patches


class Vit(VisionTransformer):  # type: ignore[misc]
    """timm's ViT with a chosen rule for resizing its positions.

    Tokens are the class token, the distillation token, registers and patches, as far as they exist.
    Registers have no positions.
    """

    def __init__(
        self,
        *,
        positions: str,
        conv_stem: bool = False,
        padding: str = "",
        norm_eps: float = 1e-6,
        distilled: bool = False,
        gated: bool = False,
        whole_patches: bool = False,
        resnet: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        """
        Args:
            positions: name of the rule in `RULES`, or `fixed` for inputs of one size.
            conv_stem: embed patches by `ConvStem`.
            padding: pad inputs with zeros to whole patches, at the `corner` or around the `center`.
                Without it, pixels beyond the last whole patch are ignored.
            norm_eps: epsilon of every layer norm.
            distilled: a distillation token follows the class token (DeiT, arXiv 2012.12877).
            gated: MLPs are SwiGLU (arXiv 2002.05202).
            whole_patches: refuse inputs that patches do not tile. Without it, pixels beyond the
                last whole patch are ignored.
            resnet: `layers` and `width` of `HybridPatches`.

        Raises:
            KeyError: no rule is called `positions`.
        """
        embed_layer: Any = CenteredPatches if padding == "center" else Patches
        if conv_stem:
            embed_layer = ConvStem
        elif resnet is not None:
            embed_layer = partial(HybridPatches, **resnet)
        self._rule = None if positions == "fixed" else RULES[positions]
        if gated:
            arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        super().__init__(
            dynamic_img_size=self._rule is not None,
            dynamic_img_pad=bool(padding),
            embed_layer=embed_layer,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            **arguments,
        )
        self._whole_patches = whole_patches
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim)) if distilled else None
        self.num_prefix_tokens += distilled
        positioned = 0 if self.no_embed_class else self.num_prefix_tokens - self.num_reg_tokens
        self._positioned = positioned
        rows = self.patch_embed.num_patches + positioned
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, self.embed_dim))

    def check_size(self, height: int, width: int) -> str | None:
        """What is wrong with inputs of that size, or None."""
        stored = self.patch_embed.img_size
        if self._rule is None and (height, width) != stored:
            return f"its positions are for {stored[0]}x{stored[1]} pixels alone"
        rows, columns = self.patch_embed.patch_size
        if self._whole_patches and (height % rows or width % columns):
            return f"its sides must be multiples of {rows} and {columns}, the size of a patch"
        return None

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = self.patch_embed.grid_size
        if self._rule is not None:
            grid = (x.shape[1], x.shape[2])
            x = x.flatten(1, 2)
        named = (self.cls_token, self.dist_token)
        tokens = [token.expand(x.shape[0], -1, -1) for token in named if token is not None]
        if self._positioned:
            x = torch.cat([*tokens, x], 1) + self.positions(grid)
        else:
            x = torch.cat([*tokens, x + self.positions(grid)], 1)
        if self.reg_token is None:
            return x
        registers = self.reg_token.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, : len(tokens)], registers, x[:, len(tokens) :]], 1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table (1, T, D) for a grid of (h, w) cells, after the rows of class and distillation
        token, if they have any."""
        table: Tensor = self.pos_embed
        stored: tuple[int, int] = self.patch_embed.grid_size
        if self._rule is None or grid == stored:
            return table
        prefix = self._positioned
        cells = torch.unflatten(table[:, prefix:], 1, stored).permute(0, 3, 1, 2)
        resized = self._rule(cells, grid)
        return torch.cat([table[:, :prefix], resized.flatten(2).transpose(1, 2)], 1)


class ProjectedVit(Vit):
    """The image tower of a two-tower model: a ViT with a projection to the shared space."""

    def __init__(self, *, projected: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.projection = nn.Parameter(torch.zeros(self.embed_dim, projected))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The projected pooled features, (B, projected)."""
        pooled: Tensor = super().forward_head(x, pre_logits=True)
        return pooled @ self.projection


class DistilledVit(Vit):
    """A ViT with a classifier on each of its class and distillation token (DeiT)."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(distilled=True, **arguments)
        classes = self.num_classes
        self.head_dist = nn.Linear(self.embed_dim, classes) if classes else nn.Identity()

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Both classifiers."""
        return self.head, self.head_dist

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token (B, D), or the mean of both classifiers' logits (B, K)."""
        if pre_logits:
            return x[:, 0]
        logits: Tensor = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return logits


NETWORKS = {"distilled-vit": DistilledVit, "projected-vit": ProjectedVit, "vit": Vit}
