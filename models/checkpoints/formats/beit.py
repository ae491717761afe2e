"""BEiT's pre-training (arXiv 2106.08254, v2 2208.06366, github.com/microsoft/unilm).

timm's names with separate biases of queries and values, and `lm_head` over the codebook. v2 has
further blocks (`cls_pt_layers`), which train the class token alone. PeCo (arXiv 2111.12710,
github.com/microsoft/PeCo) is assumed to have the same layout.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.beit import Block
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import beit_checkpoint
from models.checkpoints.families.known import whole
from models.errors import CheckpointError
from models.networks.beit import Beit
from models.reference_outputs import ReferenceRun

NAME = "beit"
CODES = ("mask_token", "lm_head.", "cls_pt_")
CLASS_LAYERS = "cls_pt_layers."
LAYER_NORM_EPS = 1e-6


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"lm_head.weight", "mask_token", "blocks.0.attn.q_bias"} <= keys:
        return "blocks with q_bias, and lm_head over a codebook"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: those of `beit_checkpoint`, and v2's `early_layers`, the block whose patches its
    further blocks take; without it `Model.run` leaves out what they return."""
    tensors = {k: v for k, v in container.tensors.items() if not k.startswith(CODES)}
    codes = {k: v for k, v in container.tensors.items() if k.startswith(CODES)}
    config = {**container.script, **arguments}
    early = whole("early_layers", config.get("early_layers") or 0, 0)
    # v2 is trained on ImageNet-1k alone, and so is the first version's file of absolute positions
    by_imagenet = "pos_embed" in tensors or any(key.startswith(CLASS_LAYERS) for key in codes)
    heads = {"codes": HeadState(codes, {"early_layers": early})}
    checkpoint = beit_checkpoint(
        NAME,
        container,
        tensors,
        arguments,
        heads=heads,
        global_pool="token",
        by_imagenet=by_imagenet,
    )
    if early > (depth := checkpoint.arguments["depth"]):
        raise CheckpointError(f"early_layers is {early}; the network has {depth} blocks")
    return checkpoint


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding_mean_pool` (B, D), which fine-tuning starts from; `linear_probe_feature` (B, 2 D);
    `last_attention` (B, heads, T, T); and with `mask` (B, N), true for masked patches, `mim_logits`
    (B, N, codes), of v2 also `mim_logits_cls_pt`."""
    network: Beit = run.network
    patches, grid = network.embed(run.inputs["pixel_values"])
    blocks = network.encode(patches, grid)
    last = blocks[-1]
    mean = last[:, 1:].mean(1)
    before = network.encode(patches, grid, count=len(blocks) - 1)[-1]
    named = {
        "embedding_mean_pool": layer_norm(mean, mean.shape[-1:], eps=LAYER_NORM_EPS),
        "linear_probe_feature": torch.cat([last[:, 0], mean], -1),
        "last_attention": network.attention(before),
    }
    if "mask" not in run.inputs:
        return named
    codes = run.states["codes"]
    mask = run.inputs["mask"].bool()[..., None]
    masked = network.encode(torch.where(mask, codes.tensors["mask_token"], patches), grid)
    head = codes.tensors["lm_head.weight"], codes.tensors["lm_head.bias"]
    named["mim_logits"] = linear(network.norm(masked[-1])[:, 1:], *head)
    early = int(codes.settings.get("early_layers", 0))
    if early and any(key.startswith(CLASS_LAYERS) for key in codes.tensors):
        x = torch.cat([masked[-1][:, :1], masked[early - 1][:, 1:]], 1)
        named["mim_logits_cls_pt"] = _class_logits(network, codes.tensors, x)
    return named


def _class_logits(network: Beit, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The logits (B, N, codes) of v2's further blocks."""
    pairs = [k.removeprefix(CLASS_LAYERS).split(".", 1) for k in tensors if CLASS_LAYERS in k]
    shared = None if network.rel_pos_bias is None else network.rel_pos_bias()
    for number in sorted({int(number) for number, _ in pairs}):
        state = {n: tensors[f"{CLASS_LAYERS}{m}.{n}"] for m, n in pairs if int(m) == number}
        block: Block = network.like_blocks(state)
        x = block(x, shared_rel_pos_bias=shared)
    if "cls_pt_norm.weight" not in tensors:
        x, prefix = network.norm(x), "lm_head."
    else:
        weights = tensors["cls_pt_norm.weight"], tensors["cls_pt_norm.bias"]
        x, prefix = layer_norm(x, x.shape[-1:], *weights, eps=LAYER_NORM_EPS), "cls_pt_lm_head."
    return linear(x[:, 1:], tensors[f"{prefix}weight"], tensors[f"{prefix}bias"])
