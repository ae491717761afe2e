"""FT-CLIP (arXiv 2212.06138, github.com/LightDXY/FT-CLIP): CLIP's image tower as a classifier.

Flat, or as DeepSpeed saves it. The plain weights are the default; the paper reports the exponential
average, `weights = "ema"`. `patch_embed` in the file is not used by upstream: `conv1` embeds the
patches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import HALF, STATISTICS
from models.checkpoints.families.known import Known, flag, number
from models.checkpoints.families.mae import request
from models.checkpoints.families.vit import choose_weights, vit_checkpoint
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun

NAME = "ft-clip"
DUMMY = "patch_embed."
RENAMED = (
    ("transformer.resblocks.", "blocks."),
    ("conv1.", "patch_embed.proj."),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("ln_pre.", "norm_pre."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("fc_norm.", "norm."),
)
CLIPS_STATISTICS = "clip_mean_and_std"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"conv1.weight", "fc_norm.weight", "head.weight", "class_embedding"} <= keys:
        return "CLIP's image tower with fc_norm and a head"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights`, `heads` or `num_heads` (as published), `clip_mean_and_std` (true), or
    else `imagenet_default_mean_and_std` (false), and `crop_pct` (1); the training script's are the
    defaults. A stated `imagenet_default_mean_and_std = true` alone suffices."""
    weights = choose_weights(container, arguments, container.wrapper)
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith(DUMMY):
            continue
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        named[key] = value
    if "cls_token" not in named or "pos_embed" not in named:
        raise CheckpointError(
            f"{container.path}: not a whole image tower of CLIP: class_embedding or "
            "positional_embedding is missing"
        )
    named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    named["pos_embed"] = named["pos_embed"][None]
    config = {"num_heads": arguments.get("heads"), **arguments}
    return vit_checkpoint(
        NAME,
        named,
        {key: value for key, value in config.items() if value is not None},
        positions="bicubic",
        preprocess=_preprocess(arguments, container.script),
        dropped=tuple(key for key in weights if key.startswith(DUMMY)),
        pre_norm=True,
        norm_eps=1e-5,
        act_layer="quick_gelu",
        global_pool="avg",
        fc_norm=False,
    )


def _preprocess(arguments: Mapping[str, Any], script: Mapping[str, Any]) -> Preprocess:
    """By the training script: the pixels of CLIP as published, or ImageNet's, or -1..1."""
    known = Known(arguments, script)

    def stated(name: str, default: bool) -> bool:
        value = known.find(name)
        return default if value is None else flag(name, value)

    plain = Preprocess(crop_pct=number("crop_pct", known.find("crop_pct") or 1.0))
    by_clips, by_imagenet = stated(CLIPS_STATISTICS, True), stated(STATISTICS, False)
    if arguments.get(STATISTICS) is not None and arguments.get(CLIPS_STATISTICS) is None:
        by_clips = by_clips and not by_imagenet
    if by_clips:
        return replace(plain, mean=MEAN, std=STD)
    return plain if by_imagenet else replace(plain, mean=HALF, std=HALF)


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`patch_tokens` (B, N, D) after the norm, and `tokens_pre_norm` (B, 1 + N, D)."""
    [last] = run.output.layers.values()
    return {"patch_tokens": run.output.patches_BTD, "tokens_pre_norm": last}
