"""IRT (arXiv 2102.05644): a DeiT whose class token is a descriptor for image retrieval.

A PCA, learned separately, is the companion file `pca.npz`: `mean` (D,) and `components` (K, D). No
checkpoint is published.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import pca_path
from models.checkpoints.families.vit import MARKS, vit_checkpoint
from models.errors import CheckpointError
from models.reference_outputs import ReferenceRun
from models.trunks.pooling import gem

NAME = "irt"
CLASSIFIERS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    """The weights alone are a plain DeiT's, so that a PCA or `pca_dim` identifies the format."""
    if "architecture" in arguments or not container.tensors.keys() >= MARKS:
        return None
    if pca_path(container, arguments).is_file() or "pca_dim" in arguments:
        return "a ViT in timm's names, with a PCA for its descriptors"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `pca`, a path (`pca.npz` beside the file); `num_heads` (as published)."""
    tensors = {k: v for k, v in container.tensors.items() if k not in CLASSIFIERS}
    path = pca_path(container, arguments)
    return vit_checkpoint(
        NAME,
        tensors,
        arguments,
        positions="bicubic",
        heads={"pca": HeadState(_read_pca(path))} if path.is_file() else {},
        dropped=tuple(key for key in CLASSIFIERS if key in container.tensors),
        distilled="dist_token" in tensors,
        whole_patches=True,
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """The descriptor and the paper's alternatives, all of unit length but `embedding_raw`."""
    cls, patches = run.output.tokens_BTD[:, 0], run.output.patches_BTD
    named = {
        "embedding": normalize(cls, dim=-1),
        "embedding_raw": cls,
        "descriptor_avg": normalize(patches.mean(1), dim=-1),
        "descriptor_max": normalize(patches.amax(1), dim=-1),
        "descriptor_gem": normalize(gem(patches), dim=-1),
    }
    projection = run.heads["embed"].network
    if projection is not None:
        named["embedding_pca"] = normalize(projection(cls), dim=-1)
    return named


def _read_pca(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in ("mean", "components")}
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: not a PCA with mean and components: {error}") from error
