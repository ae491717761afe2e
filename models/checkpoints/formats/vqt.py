"""Visual Query Tuning (arXiv 2212.03220, andytu28/VQT): query tokens and a classifier.

`enc.` holds the frozen backbone, in the names of its supervised ViTs or in timm's (the MAE route);
where a file has only what was trained, the backbone lies beside it. A classifier that takes fewer
features than there are was trained on a selection, which upstream keeps in another file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import open_companion
from models.checkpoints.families.jax import POSITIONS, from_jax, num_heads
from models.checkpoints.families.vit import vit_arguments
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun

NAME = "vqt"
QUERIES = ("enc.transformer.encoder.query_prompt_embeddings", "enc.query_prompt_embeddings")
BACKBONES = ("backbone.pth", "backbone.npz")
PRETRAINING = ("decoder_", "mask_token", "norm.", "head.")
RENAMED = (
    ("transformer.embeddings.position_embeddings", "pos_embed"),
    ("transformer.embeddings.cls_token", "cls_token"),
    ("transformer.embeddings.patch_embeddings.", "patch_embed.proj."),
    ("transformer.encoder.encoder_norm.", "norm."),
    ("transformer.encoder.layer.", "blocks."),
    (".attention_norm.", ".norm1."),
    (".ffn_norm.", ".norm2."),
    (".ffn.", ".mlp."),
    (".attn.out.", ".attn.proj."),
)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    found = [key for key in QUERIES if key in container.tensors]
    if found and "head.last_layer.weight" in container.tensors:
        return f"query tokens {found[0]} and a classifier head.last_layer"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `num_heads`, `img_size` and `backbone` where the file does not tell;
    `normalize_feats` (true), `pooling_feats` (false: else a block's queries are averaged);
    `indices`, the features selected (numbers, or a `.npy` file of them)."""
    tensors = container.tensors
    is_mae = QUERIES[1] in tensors
    own = {k.removeprefix("enc."): v for k, v in tensors.items() if k.startswith("enc.")}
    queries = own.pop(QUERIES[is_mae].removeprefix("enc."))
    head: dict[str, Tensor] = {"queries": queries, **_classifier(container)}
    if "combine_params" in own:
        head["combine"] = own.pop("combine_params")
    elif arguments.get("pooling_feats"):
        head["combine"] = torch.full(queries.shape[:2], 1 / queries.shape[1])
    if "indices" in arguments:
        head["indices"] = _indices(container, arguments["indices"])
    told = dict(arguments)
    dropped: tuple[str, ...] = ()
    if not any("patch_embed" in key for key in own):
        backbone = open_companion(container, arguments, "backbone", BACKBONES)
        beside, dropped = _backbone(backbone, told, is_mae)
        own = {**beside, **own}
    trunk = _in_timms_names(own)
    if is_mae and "fc_norm.weight" not in trunk:  # not in MAE's file; upstream leaves it as it is
        dim = queries.shape[-1]
        trunk |= {"fc_norm.weight": torch.ones(dim), "fc_norm.bias": torch.zeros(dim)}
    built = vit_arguments(trunk, told) | {"num_classes": 0}
    settings = {
        "normalize": bool(arguments.get("normalize_feats", True)),
        "activations": _activations(head),
    }
    return Checkpoint(
        format=NAME,
        architecture="vit_base_patch16_224",
        arguments=built | ({"global_pool": "avg"} if is_mae else {}),
        state_dict=trunk,
        heads={"vqt": HeadState(head, settings)},
        preprocess=Preprocess(
            input_size=(built["img_size"], built["img_size"]),
            crop_pct=1.0,
            crop_mode="squash",
            interpolation="bilinear",
        ),
        dropped=dropped,
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """What the classifier saw, and what that was made of."""
    head: Any = run.heads["classify"]
    return {
        "embedding": head.features(run.output),
        "backbone_embedding": run.trunk.pool(run.output),
        "query_outputs": run.output.queries[head.queries],
    }


def _classifier(container: Container) -> dict[str, Tensor]:
    """`head.projection` (Linear, ReLU, BatchNorm1d in turn, if there is any) and
    `head.last_layer`, numbered in their order."""
    tensors = container.tensors
    prefix = "head.projection."
    hidden = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    last = {k: v for k, v in tensors.items() if k.startswith("head.last_layer.")}
    after = 1 + max((int(key.split(".")[0]) for key in hidden), default=-1)
    return {
        **{f"classifier.{key}": value for key, value in hidden.items()},
        **{f"classifier.{after}.{key.split('.')[-1]}": value for key, value in last.items()},
    }


def _activations(head: Mapping[str, Tensor]) -> dict[str, str]:
    """A ReLU after each hidden linear layer."""
    places = sorted(
        int(key.split(".")[1])
        for key, value in head.items()
        if key.startswith("classifier.") and value.dim() == 2
    )
    return {str(place + 1): "relu" for place in places[:-1]}


def _backbone(
    backbone: Container, told: dict[str, Any], is_mae: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A backbone of its own file, and the keys that its pre-training alone needed."""
    tensors = backbone.tensors
    if POSITIONS in tensors:
        told["num_heads"] = num_heads(tensors)
        side = int(told.get("img_size", 224)) // tensors["embedding/kernel"].shape[0]
        kept = ("cls", "embedding/", "Transformer/")
        left = tuple(key for key in tensors if not key.startswith(kept))
        return from_jax(tensors, (side, side)), left
    if not is_mae:
        return dict(tensors), ()
    dropped = tuple(key for key in tensors if key.startswith(PRETRAINING))
    return {k: v for k, v in tensors.items() if k not in dropped}, dropped


def _in_timms_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        named[key] = value
    for key in [key for key in named if ".attn.query." in key]:
        parts = [key.replace("query", part) for part in ("query", "key", "value")]
        if missing := [part for part in parts if part not in named]:
            raise CheckpointError(f"the weight {missing[0]} is missing")
        named[key.replace("query", "qkv")] = torch.cat([named.pop(part) for part in parts])
    if "patch_embed.proj.weight" not in named or "pos_embed" not in named:
        raise CheckpointError("the backbone has no patch embedding or no positions")
    return named


def _indices(container: Container, given: Any) -> Tensor:
    if isinstance(given, str | Path):
        path = container.path.parent / given
        try:
            given = np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable .npy file of indices") from error
    return torch.as_tensor(np.asarray(given)).long()
