"""Scale-MAE (arXiv 2212.14532, github.com/bair-climate-initiative/scale-mae).

Pre-training with its decoder, or a classifier. Positions are computed from the ground sample
distance; the position tables in the file are not used.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, number, whole, wholes
from models.checkpoints.families.mae import ENCODER
from models.checkpoints.families.vit import MARKS, vit_arguments
from models.errors import CheckpointError
from models.heads.reconstruct import Reconstruct
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.networks.masked import patchify
from models.reference_outputs import ReferenceRun

NAME = "scale-mae"
UNUSED = ("pos_embed",)
DECODER = ("fpn.", "fcn", "mask_token", "decoder_")
PYRAMID = "fpn.fpn2.0.weight"
DECODER_UNUSED = ("mask_token_decoder", "decoder_pos_embed")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if not keys >= MARKS:
        return None
    if PYRAMID in keys:
        return "a ViT in timm's names with a pyramid of decoders"
    script = container.script
    if "eval_base_resolution" in script and "head.1.weight" in keys:
        return "a ViT in timm's names with its head, by a script that notes eval_base_resolution"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `num_heads` (as published), `absolute_scale` (false), `decoder_num_heads` (16),
    `mask_ratio` (0.75), `band_config` (7, 56); the training script's are the defaults."""
    tensors = container.tensors
    config = {**container.script, **arguments}
    built = vit_arguments(tensors, arguments) | {"num_classes": 0}
    built["absolute_scale"] = flag("absolute_scale", config.get("absolute_scale", False))
    defaults: dict[str, Any] = {"num_heads": built["num_heads"], "absolute_scale": False}
    heads = {}
    head = {k: v for k, v in tensors.items() if k.startswith("head.")}
    if head:
        classifier = {key.replace("head.", "classifier."): value for key, value in head.items()}
        heads["linear"] = HeadState(classifier, {"norm_eps": 1e-6})
    if PYRAMID in tensors:
        heads["decoder"] = _decoder(container, arguments)
        defaults |= {"decoder_num_heads": 16, "mask_ratio": 0.75, "band_config": [7, 56]}
    kept = {
        key: value
        for key, value in tensors.items()
        if key.startswith((*ENCODER, "fc_norm.")) and key not in UNUSED
    }
    if "fc_norm.weight" in kept:
        built["global_pool"] = "avg"
    size = (built["img_size"], built["img_size"])
    return Checkpoint(
        format=NAME,
        architecture="scale-vit",
        library=OWN,
        arguments=built,
        state_dict=kept,
        heads=heads,
        assumed={name: value for name, value in defaults.items() if name not in config},
        preprocess=replace(Preprocess(), input_size=size, crop_mode="squash", crop_pct=1.0),
        dropped=tuple(
            key
            for key in tensors
            if key not in kept
            and key not in head
            and (not key.startswith(DECODER) or key in DECODER_UNUSED)
        ),
    )


def _decoder(container: Container, arguments: Mapping[str, Any]) -> HeadState:
    config = {**container.script, **arguments}
    tensors = {
        key: value
        for key, value in container.tensors.items()
        if key.startswith(DECODER) and key not in DECODER_UNUSED
    }
    settings = {
        "num_heads": whole("decoder_num_heads", config.get("decoder_num_heads", 16)),
        "mask_ratio": number("mask_ratio", config.get("mask_ratio", 0.75)),
        "band": _band(config.get("band_config", (7, 56))),
    }
    return HeadState(tensors, settings)


def _band(stated: Any) -> int:
    """The side of the low frequencies: the first of `band_config`, two sides in pixels."""
    sides = wholes("band_config", stated)
    if len(sides) != 2 or sides[0] >= sides[1]:
        raise CheckpointError(f"band_config is {stated!r}; it must be a smaller and a larger side")
    return sides[0]


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """With `input_res` (B,), tokens, embedding and logits at those scales. With `noise` (B, N),
    `mask` and the reconstructions, for the scales `input_res_2` (B,) if they are among the inputs;
    those of progressive decoders are for `input_res`.
    """
    named: dict[str, Tensor] = {}
    pixels, scale = run.inputs["pixel_values"], run.inputs.get("input_res")
    network = run.network
    if scale is not None:
        scaled = replace(run.output, features=network.forward_features(pixels, scale))
        named = {"tokens": scaled.features, "embedding": run.trunk.pool(scaled)}
        if "classify" in run.heads:
            named |= run.heads["classify"].forward(scaled)
    head = run.heads.get("reconstruct")
    if isinstance(head, Reconstruct) and "noise" in run.inputs:
        if not head.network.fpn.progressive:
            scale = run.inputs.get("input_res_2", scale)
        visible = head.encode(pixels, run.inputs["noise"], None, scale)
        drawn = head.draw_scales(visible, scale)
        patch = network.patch_embed.patch_size[0]
        named |= {
            "mask": visible.mask,
            "reconstruction": patchify(drawn.combined, patch),
            "reconstruction_high": patchify(drawn.high, patch),
            "reconstruction_low": patchify(drawn.low, patch),
        }
    return named
