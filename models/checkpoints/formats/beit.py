"""BEiT's pre-training (arXiv 2106.08254, github.com/microsoft/unilm).

timm's names with separate biases of queries and values, and `lm_head` over the codebook. PeCo
(arXiv 2111.12710, github.com/microsoft/PeCo) is assumed to have the same layout.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import beit_checkpoint
from models.reference_outputs import ReferenceRun

NAME = "beit"
PRETRAINING = ("mask_token", "lm_head.weight", "lm_head.bias")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"lm_head.weight", "mask_token", "blocks.0.attn.q_bias"} <= keys:
        return "blocks with q_bias, and lm_head over a codebook"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    tensors = dict(container.tensors)
    codes = HeadState({key: tensors.pop(key) for key in PRETRAINING})
    return beit_checkpoint(
        NAME, container, tensors, arguments, heads={"codes": codes}, global_pool="token"
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding_mean_pool` (B, D), which fine-tuning starts from; `linear_probe_feature` (B, 2 D);
    and with `mask` (B, N), true for masked patches, `mim_logits` (B, N, codes)."""
    network = run.network
    pixels = run.inputs["pixel_values"]
    last = _blocks(network, pixels, None)
    mean = last[:, 1:].mean(1)
    named = {
        "embedding_mean_pool": layer_norm(mean, mean.shape[-1:], eps=1e-6),
        "linear_probe_feature": torch.cat([last[:, 0], mean], -1),
    }
    if "mask" in run.inputs:
        codes = run.states["codes"].tensors
        masked = _blocks(network, pixels, (run.inputs["mask"], codes["mask_token"]))
        patches = network.norm(masked)[:, 1:]
        named["mim_logits"] = linear(patches, codes["lm_head.weight"], codes["lm_head.bias"])
    return named


def _blocks(network: Any, pixels: Tensor, masked: tuple[Tensor, Tensor] | None) -> Tensor:
    """The last block's output before the norm, (B, 1 + N, D).

    Args:
        masked: the mask (B, N) and the token that replaces masked patches.
    """
    x = network.patch_embed(pixels)
    if masked is not None:
        mask, token = masked
        x = torch.where(mask.bool()[..., None], token, x)
    x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], 1)
    if network.pos_embed is not None:
        x = x + network.pos_embed
    shared = None if network.rel_pos_bias is None else network.rel_pos_bias()
    for block in network.blocks:
        x = block(x, shared_rel_pos_bias=shared)
    tokens: Tensor = x
    return tokens
