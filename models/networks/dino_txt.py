"""dino.txt's image tower (arXiv 2412.16334, github.com/facebookresearch/dinov2)."""

from functools import partial
from typing import Any

import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.networks.vit import Vit


class DinoTxtVit(Vit):
    """A DINOv2 ViT, blocks over its normalised tokens, and both its class and mean patch token."""

    def __init__(self, *, head_blocks: int, head_hidden: int, **arguments: Any) -> None:
        """
        Args:
            head_blocks: blocks after the backbone.
            head_hidden: the width of their SwiGLU MLPs.
        """
        super().__init__(**arguments)
        dim = self.embed_dim
        self.head_blocks = nn.Sequential(
            *(
                Block(
                    dim,
                    arguments["num_heads"],
                    mlp_ratio=(head_hidden + 0.5) / dim,
                    init_values=1e-5,
                    norm_layer=partial(nn.LayerNorm, eps=1e-5),
                    mlp_layer=SwiGLU,
                    act_layer=nn.SiLU,
                )
                for _ in range(head_blocks)
            )
        )
        self.head_norm = nn.LayerNorm(dim, eps=1e-5)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The embedding, (B, 2 D)."""
        x = self.head_norm(self.head_blocks(x))
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(1)], 1)


NETWORKS = {"dino-txt-vit": DinoTxtVit}
