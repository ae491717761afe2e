"""Fine-tuned classifiers of MAE (arXiv 2111.06377), SupMAE, SdMAE and TinyMIM.

A ViT in timm's names with its head under `model`. The head reads `fc_norm` of the mean patch token,
or the class token. Linear probes have a batch norm without affine parameters before the head.
Upstream is github.com/facebookresearch/mae.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import OWN_TABLE, SCRIPT, SHARED
from models.checkpoints.families.mae import ENCODER
from models.checkpoints.families.vit import MARKS, vit_checkpoint

NAME = "mae-finetuned"
KEPT = (*ENCODER, "fc_norm.", "head.")
# What tells a BEiT, or an iBOT fine-tuned by BEiT's script.
BEIT = {"blocks.0.attn.q_bias", "blocks.0.gamma_1", OWN_TABLE, SHARED}
CROPPED_SIZE = 224  # pixels
PROBE = {"head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias"}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if container.wrapper != "model" or "architecture" in arguments or not keys >= MARKS:
        return None
    if BEIT & keys or SCRIPT in container.script:
        return None
    script = {"nb_classes", "finetune"} <= container.script.keys()
    if "distillation_type" in container.script:  # DeiT's script
        return None
    if _is_scale_mae(container) or not all(key.startswith(KEPT) for key in keys):
        return None
    if keys >= PROBE:
        return "a ViT in timm's names under model, with a batch norm before its head"
    if "head.weight" in keys and ("fc_norm.weight" in keys or script):
        return "a ViT in timm's names with its head under model, as MAE's script saves it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    tensors = dict(container.tensors)
    heads = {}
    if tensors.keys() >= PROBE:
        probe = {key: tensors.pop(key) for key in list(tensors) if key.startswith("head.")}
        heads["linear"] = HeadState(
            {key.replace("head.", "classifier."): value for key, value in probe.items()},
            {"norm_eps": 1e-6},
        )
    pool = "avg" if "fc_norm.weight" in tensors else "token"
    checkpoint = vit_checkpoint(
        NAME, tensors, arguments, positions="bicubic", heads=heads, global_pool=pool
    )
    # upstream evaluates larger ones, such as ViT-H at 448 pixels, without a crop
    crop_pct = 0.875 if checkpoint.arguments["img_size"] <= CROPPED_SIZE else 1.0
    assert checkpoint.preprocess is not None
    return replace(checkpoint, preprocess=replace(checkpoint.preprocess, crop_pct=crop_pct))


def _is_scale_mae(container: Container) -> bool:
    return "eval_base_resolution" in container.script
