"""Segmenter's mask transformer (arXiv 2105.05633): class tokens beside a map's patches."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.segmentation.decoders.layers import Pyramid, indices

TYPES = ("SegmenterMaskTransformerHead",)
MARK = "cls_emb"


class MaskTransformer(nn.Module):
    """Cosines between patches and class tokens, after a transformer over both."""

    def __init__(
        self, inputs: int, dim: int, classes: int, *, depth: int, heads: int, mlp_ratio: float,
        norm_eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.proj_dec = nn.Linear(inputs, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, dim))
        self.blocks = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.decoder_norm = norm(dim)
        self.proj_patch = nn.Parameter(torch.zeros(dim, dim))
        self.proj_classes = nn.Parameter(torch.zeros(dim, dim))
        self.mask_norm = norm(classes)

    def forward(self, maps: Pyramid) -> Tensor:
        [x] = maps
        size, count = x.shape[2:], self.cls_emb.shape[1]
        tokens = self.proj_dec(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([tokens, self.cls_emb.expand(x.shape[0], -1, -1)], 1)
        tokens = self.decoder_norm(self.blocks(tokens))
        patches = normalize(tokens[:, :-count] @ self.proj_patch, dim=-1)
        classes = normalize(tokens[:, -count:] @ self.proj_classes, dim=-1)
        masks: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))
        return torch.unflatten(masks.transpose(1, 2), 2, tuple(size))


def create(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> nn.Module:
    """`settings`: `num_heads`, and `norm_eps` (1e-5).

    Raises:
        KeyError: there are no `num_heads`, which no shape determines.
        ValueError: they do not divide the channels.
    """
    if len(inputs) != 1:
        raise ValueError(f"in_index has {len(inputs)} levels; the head reads one")
    _, classes, dim = tensors["cls_emb"].shape
    heads = int(settings["num_heads"])
    if heads < 1 or dim % heads:
        raise ValueError(f"num_heads is {heads}; set a divisor of the decoder's {dim} channels")
    return MaskTransformer(
        inputs[0],
        dim,
        classes,
        depth=len(indices(tensors, "blocks.")),
        heads=heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        norm_eps=float(settings.get("norm_eps", 1e-5)),
    )
