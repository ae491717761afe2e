"""ConvNeXt with one stage after a patch embedding (arXiv 2201.03545, section 3.3)."""

from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn


class ConvNeXtIsotropic(nn.Module):
    """timm's ConvNeXt blocks at one resolution. The stem has no norm."""

    def __init__(
        self, *, dim: int, depth: int, patch_size: int, layer_scale: bool, num_classes: int
    ) -> None:
        """
        Args:
            layer_scale: whether blocks scale their output by `gamma`.
        """
        super().__init__()
        self.num_classes = num_classes
        self.num_features = dim
        self.stem = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        scale = 1e-6 if layer_scale else None
        self.blocks = nn.Sequential(
            *(ConvNeXtBlock(dim, kernel_size=7, ls_init_value=scale) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to a map (B, D, h, w), before the norm."""
        features: Tensor = self.blocks(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The norm of the map's mean (B, D), or logits (B, K)."""
        pooled: Tensor = self.norm(x.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)


NETWORKS = {"convnext-isotropic": ConvNeXtIsotropic}
