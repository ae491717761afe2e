"""DeiT (arXiv 2012.12877), distilled or not, and DeiT III (arXiv 2204.07118).

A ViT with its head in timm's names, alone under `model`, or in a checkpoint of the training script.
DeiT III has layer scale, and no position for the class token. The same files are published for
cosub and for Three Things. Upstream is github.com/facebookresearch/deit.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.companions import pca_path
from models.checkpoints.families.heads import VIT
from models.checkpoints.families.known import Known, number
from models.checkpoints.families.vit import (
    MARKS,
    choose_weights,
    in_timms_names,
    vit_checkpoint,
)
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun

NAME = "deit"
HEADS = {**VIT, 512: 8}  # as published, with the medium DeiT III
WHOLE = MARKS | {"blocks.0.attn.qkv.bias", "norm.weight", "head.weight"}
KEPT = (
    "cls_token", "dist_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.",
    "head.weight", "head.bias", "head_dist.",
)  # fmt: skip

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if container.wrapper != "model" or "architecture" in arguments or not keys >= WHOLE:
        return None
    if not all(key.startswith(KEPT) for key in keys):
        return None
    if "pca_dim" in arguments or pca_path(container, arguments).is_file():
        return None
    if "distillation_type" in container.script:
        return "a ViT in timm's names with its head, by DeiT's training script"
    if not container.beside and container.sets.keys() == {"model"}:
        return "a ViT in timm's names with its head, alone under model"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `num_heads` (as published), `crop_pct` of the evaluation
    (1 for DeiT III, else 0.875)."""
    weights = choose_weights(container, arguments, "model")
    known = Known(arguments, container.script)
    is_third = "blocks.0.gamma_1" in weights
    crop = number("crop_pct", known.get("crop_pct", 1.0 if is_third else 0.875, "eval_crop_ratio"))
    distilled = "dist_token" in weights
    return vit_checkpoint(
        NAME,
        in_timms_names(weights),
        arguments,
        positions="fixed",
        preprocess=Preprocess(crop_pct=crop),
        assumed=known.assumed,
        published=HEADS,
        architecture="distilled-vit" if distilled else "vit",
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """The last block's attention and the map; of a distilled network each token and its logits."""
    network, tokens = run.network, run.output.features
    named = attention_outputs(run)
    if getattr(network, "head_dist", None) is not None:
        named |= {
            "embedding_dist": tokens[:, 1],
            "logits_cls": network.head(tokens[:, 0]),
            "logits_dist": network.head_dist(tokens[:, 1]),
        }
    return named
