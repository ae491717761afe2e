"""Small-scale ViTs' fine-tuned classifiers (arXiv 2210.07240).

A ViT, Swin or CaiT with its head under `model_state_dict`, which upstream overwrites by the flat
state dict at the end of fine-tuning. Upstream is
github.com/hananshafi/vits-for-small-scale-datasets.
"""

import re
from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.cait import FLAT_PATCH
from models.checkpoints.families.companions import pca_path
from models.checkpoints.families.self_supervised import backbone_kind
from models.checkpoints.families.small_scale import DATASETS, small_scale_checkpoint
from models.checkpoints.families.vit import PATCHES

NAME = "small-scale-vits-finetuned"
PATCH_SIZES = (4, 8)  # of the networks for 32 and for 64 pixels
# The keys of a ViT that has nothing besides its blocks and a head.
PLAIN = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|head|"
    r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
)

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys, kind = container.tensors.keys(), backbone_kind(container.tensors)
    if "head.weight" not in keys or kind not in ("ViT", "Swin", "CaiT"):
        return None
    if container.wrapper == "model_state_dict":
        return f"a {kind} with its head under model_state_dict"
    if kind == "CaiT" and f"{FLAT_PATCH}weight" in keys:
        return "a CaiT whose patches are embedded by a linear layer"
    is_bare = not container.wrapper and not {"architecture", "pca_dim"} & arguments.keys()
    is_irts = pca_path(container, arguments).is_file()
    if kind == "ViT" and is_bare and not is_irts and _is_small_vit(container):
        return "a flat state dict of a ViT of 32 or 64 pixels with MLPs of twice its width"
    stages = {key.split(".")[1] for key in keys if key.startswith("layers.")}
    if kind == "Swin" and not container.wrapper and len(stages) == 3:
        return "a flat state dict of a Swin of three stages with its head"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    return small_scale_checkpoint(NAME, container.tensors, arguments)


def _is_small_vit(container: Container) -> bool:
    """Whether a plain ViT takes a small data set's images, and its MLPs are twice as wide."""
    tensors = container.tensors
    patches, fc1 = tensors.get(PATCHES), tensors.get("blocks.0.mlp.fc1.weight")
    positions = tensors["pos_embed"]
    if patches is None or fc1 is None or (patches.dim(), fc1.dim(), positions.dim()) != (4, 2, 3):
        return False
    patch, rows = patches.shape[-1], positions.shape[1] - 1
    sizes = {dataset.size for dataset in DATASETS.values()}
    return (
        patch in PATCH_SIZES
        and fc1.shape[0] == 2 * fc1.shape[1]
        and any(rows == (size // patch) ** 2 for size in sizes)
        and all(PLAIN.fullmatch(key) for key in tensors)
    )
