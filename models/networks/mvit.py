"""MViT v1 and v2 (arXiv 2104.11227, 2112.01526).

timm's network runs image models with relative positions (v2); torchvision's runs all others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MViT


def image_mvit(
    *, img_size: int, num_classes: int, global_pool: str, config: Mapping[str, Any]
) -> nn.Module:
    """timm's MViT v2; `config` holds the fields of its `MultiScaleVitCfg`."""
    network: nn.Module = MultiScaleVit(
        MultiScaleVitCfg(**config),
        img_size=(img_size, img_size),
        num_classes=num_classes,
        global_pool=global_pool,
    )
    return network


class TokenMvit(MViT):  # type: ignore[misc]
    """torchvision's MViT with timm's `forward_features` and `forward_head`.

    Takes clips (B, 3, T, H, W), or images (B, 3, H, W) as clips of one frame.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        *,
        img_size: int,
        frames: int,
        blocks: Sequence[Mapping[str, Any]],
        num_classes: int,
        version: int,
        **stem: Any,
    ) -> None:
        second = version == 2
        super().__init__(
            (img_size, img_size),
            frames,
            [MSBlockConfig(**block) for block in blocks],
            residual_pool=second,
            residual_with_cls_embed=False,
            rel_pos_embed=second,
            proj_after_attn=second,
            num_classes=num_classes,
            **{name: tuple(sizes) for name, sizes in stem.items()},
        )
        self.num_classes = num_classes
        self.last_grid = (0, 0, 0)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the norm, (B, 1 + T * h * w, D): class token first, then frame by frame."""
        if x.dim() == 4:
            x = x[:, :, None]
        tokens = self.pos_encoding(self.conv_proj(x).flatten(2).transpose(1, 2))
        grid = (self.pos_encoding.temporal_size, *self.pos_encoding.spatial_size)
        for block in self.blocks:
            tokens, grid = block(tokens, grid)
        self.last_grid = grid
        normed: Tensor = self.norm(tokens)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the class token (B, D)."""
        first = x[:, 0]
        return first if pre_logits else self.head(first)


NETWORKS = {"mvit-images": image_mvit, "mvit-tokens": TokenMvit}
