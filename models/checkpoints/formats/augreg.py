"""Google's `.npz` ViTs (ViT, arXiv 2010.11929; AugReg, arXiv 2106.10270), in old or linen names.
The authors resize without antialiasing and do not round; here resized pixels are rounded to 8 bits.
SAM's, GSAM's and those trained from scratch (i1k, i21k) were evaluated otherwise, which files do
not say: set `preprocess = {crop_mode = "center", crop_pct = 0.875, interpolation = "box"}`.

Hybrids embed patches of a ResNet's map. big_vision's `resize_small(256)|central_crop(224)` has
TensorFlow's `area` interpolation, to which Pillow's `box` is the nearest.

Upstream is github.com/google-research/vision_transformer. The authors' code approximates GELU by
tanh, timm computes it exactly. The authors' way is the default here; `arguments = {act = "gelu"}`
selects timm's.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.jax import (
    ASSUMED,
    POSITIONS,
    PREPROCESS,
    from_jax,
    in_old_names,
    num_heads,
    resnet_arguments,
)
from models.checkpoints.families.vit import vit_checkpoint
from models.reference_outputs import ReferenceRun

NAME = "augreg"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if POSITIONS in in_old_names(container.tensors):
        return "a JAX ViT, by its Transformer/posembed_input"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `act`, the name of an activation in timm (`gelu_tanh`)."""
    tensors = in_old_names(container.tensors)
    kept = from_jax(tensors)
    heads: dict[str, HeadState] = {}
    if "head/kernel" in tensors:
        head = {"weight": tensors["head/kernel"].T.contiguous(), "bias": tensors["head/bias"]}
        if "pre_logits/kernel" in tensors:  # timm's ViT no longer has this layer
            heads["linear"] = HeadState(
                {
                    "classifier.0.weight": tensors["pre_logits/kernel"].T.contiguous(),
                    "classifier.0.bias": tensors["pre_logits/bias"],
                    **{f"classifier.2.{key}": value for key, value in head.items()},
                },
                {"activations": {"1": "tanh"}},
            )
        else:
            kept |= {f"head.{key}": value for key, value in head.items()}
    built: dict[str, Any] = {"act_layer": str(arguments.get("act", "gelu_tanh"))}
    if (resnet := resnet_arguments(tensors)) is not None:
        built["resnet"] = resnet
    if "cls_token" not in kept:
        built |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    config = {**arguments, "num_heads": num_heads(tensors)}
    return vit_checkpoint(
        NAME,
        kept,
        config,
        positions="corners",
        heads=heads,
        preprocess=PREPROCESS,
        assumed=ASSUMED,
        **built,
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`pos_embedding` for the input's grid; `embedding`, the classifier's input; and embedding and
    logits with exact GELU, as timm computes them."""
    network = run.network
    exact = _with_exact_gelu(network).forward_features(run.inputs["pixel_values"])
    exact_output = replace(run.output, features=exact)
    named = {
        "pos_embedding": network.positions(run.output.grid),
        "embedding": _embedding(run),
        "embedding_gelu_erf": _embedding(replace(run, output=exact_output)),
    }
    if "classify" in run.heads:
        named["logits_gelu_erf"] = run.heads["classify"].forward(exact_output)["logits"]
    return named


def _embedding(run: ReferenceRun) -> Tensor:
    """(B, D): the pooled features, through `pre_logits` where the file has it."""
    pooled = run.trunk.pool(run.output)
    state = run.states.get("linear")
    if state is None:
        return pooled
    tensors = state.tensors
    hidden = linear(pooled, tensors["classifier.0.weight"], tensors["classifier.0.bias"])
    return torch.tanh(hidden)


def _with_exact_gelu(network: Any) -> Any:
    """A copy of the network with exact GELU that shares its weights."""
    twin, blocks = _shallow(network), []
    for block in network.blocks:
        mlp = _shallow(block.mlp)
        mlp.act = nn.GELU()
        blocks.append(_shallow(block))
        blocks[-1].mlp = mlp
    twin.blocks = nn.Sequential(*blocks)
    return twin


def _shallow(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
