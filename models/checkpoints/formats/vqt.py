"""Visual Query Tuning (VQT, arXiv 2212.03220, github.com/andytu28/VQT): queries and a classifier.

`enc.` holds the frozen backbone, in upstream's names for supervised ViTs, or in timm's for MAE. If
a file has only the trained parts, the backbone is a companion file. A classifier with fewer inputs
than features was trained on selected features, whose indices upstream keeps in another file.
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
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.jax import POSITIONS, from_jax, num_heads
from models.checkpoints.families.known import flag, whole
from models.checkpoints.families.vit import vit_arguments
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun

NAME = "vqt"
QUERIES = ("enc.transformer.encoder.query_prompt_embeddings", "enc.query_prompt_embeddings")
BACKBONES = ("backbone.pth", "backbone.npz")
ATTENDING = "combine_selfatten_block"  # which combines features by attention
POSITIONS_OF_LAYERS = "layer_position_embeddings"  # which these get after an MLP
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
    queries = [key for key in QUERIES if key in container.tensors]
    if queries and "head.last_layer.weight" in container.tensors:
        return f"query tokens {queries[0]} and a classifier head.last_layer"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `num_heads` (as published); `backbone`, a path, and `img_size` (224), for files
    without the backbone; `normalize_feats` (true); `pooling_feats` (false), which averages a
    block's queries; `indices` of the selected features, numbers or the path of a `.npy` file."""
    tensors = container.tensors
    is_mae = QUERIES[1] in tensors
    own = {k.removeprefix("enc."): v for k, v in tensors.items() if k.startswith("enc.")}
    queries = own.pop(QUERIES[is_mae].removeprefix("enc."))
    head: dict[str, Tensor] = {"queries": queries, **_classifier(container)}
    weights = own.pop("combine_params", None)
    if arguments.get("pooling_feats"):  # which upstream prefers to weights
        head["combine"] = torch.full(queries.shape[:2], 1 / queries.shape[1])
    elif weights is not None:
        head["combine"] = weights
    if POSITIONS_OF_LAYERS in own:
        own, mlps = _split(own, "layerwise_mlps.")
        head |= {f"mlps.{key}": value for key, value in mlps.items()}
        head["positions"] = own.pop(POSITIONS_OF_LAYERS)
    own, attending = _split(own, ATTENDING)
    attending = {f"attend{key}": value for key, value in _fused(attending).items()}
    if "indices" in arguments:
        head["indices"] = _indices(container, arguments["indices"])
    config = dict(arguments)
    dropped: tuple[str, ...] = ()
    if not any("patch_embed" in key for key in own):
        backbone = open_companion(container, arguments, "backbone", BACKBONES)
        companion, dropped = _backbone(backbone, config, is_mae)
        own = {**companion, **own}
    trunk = _in_timms_names(own)
    if (
        is_mae and "fc_norm.weight" not in trunk
    ):  # MAE's file has none; upstream keeps its initial values
        dim = queries.shape[-1]
        trunk |= {"fc_norm.weight": torch.ones(dim), "fc_norm.bias": torch.zeros(dim)}
    built = vit_arguments(trunk, config) | {"num_classes": 0}
    settings = {
        "normalize": flag("normalize_feats", arguments.get("normalize_feats", True)),
        "activations": _activations(head),
    }
    if attending:
        if not settings["normalize"]:
            raise CheckpointError("normalize_feats is false; combining by attention needs it")
        settings["attending_heads"] = built["num_heads"]
    return Checkpoint(
        format=NAME,
        architecture="vit_base_patch16_224",
        arguments=built | ({"global_pool": "avg"} if is_mae else {}),
        state_dict=trunk,
        heads={"vqt": HeadState({**head, **attending}, settings)},
        assumed=assumed(config, num_heads=built["num_heads"])
        | assumed(arguments, normalize_feats=True),
        preprocess=Preprocess(
            input_size=(built["img_size"], built["img_size"]),
            crop_pct=1.0,
            crop_mode="squash",
            interpolation="bilinear",
        ),
        dropped=dropped,
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding`, the classifier's input, and the two parts that it is computed from."""
    head: Any = run.heads["classify"]
    return {
        "embedding": head.features(run.output),
        "backbone_embedding": run.trunk.pool(run.output),
        "query_outputs": run.output.queries[head.queries],
    }


def _classifier(container: Container) -> dict[str, Tensor]:
    """`head.projection` (optional; Linear, ReLU and BatchNorm1d repeated) and `head.last_layer`, as
    `classifier.NUMBER` in their order."""
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
    """Activations by position: a ReLU after each hidden linear layer."""
    places = sorted(
        int(key.split(".")[1])
        for key, value in head.items()
        if key.startswith("classifier.") and value.dim() == 2
    )
    return {str(place + 1): "relu" for place in places[:-1]}


def _backbone(
    backbone: Container, config: dict[str, Any], is_mae: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a companion file, and its keys that only pre-training uses.

    Sets `num_heads` in `config` if the file determines it.
    """
    tensors = backbone.tensors
    if POSITIONS in tensors:
        config["num_heads"] = num_heads(tensors)
        side = (
            whole("img_size", config.get("img_size", 224)) // tensors["embedding/kernel"].shape[0]
        )
        kept = ("cls", "embedding/", "Transformer/")
        others = tuple(key for key in tensors if not key.startswith(kept))
        return from_jax(tensors, (side, side)), others
    if not is_mae:
        return dict(tensors), ()
    dropped = tuple(key for key in tensors if key.startswith(PRETRAINING))
    return {k: v for k, v in tensors.items() if k not in dropped}, dropped


def _in_timms_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's keys as timm's.

    Raises:
        CheckpointError: a weight is missing.
    """
    named = _fused(tensors)
    if "patch_embed.proj.weight" not in named or "pos_embed" not in named:
        raise CheckpointError("the backbone has no patch_embed.proj.weight or no pos_embed")
    return named


def _split(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors without those below a prefix, and those under the rest of their names."""
    below = {k: value for k, value in tensors.items() if k.startswith(prefix)}
    others = {key: value for key, value in tensors.items() if key not in below}
    return others, {key.removeprefix(prefix): value for key, value in below.items()}


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's keys renamed, and queries, keys and values fused.

    Raises:
        CheckpointError: a weight is missing.
    """
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
    return named


def _indices(container: Container, indices: Any) -> Tensor:
    if isinstance(indices, str | Path):
        path = container.path.parent / indices
        try:
            indices = np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable .npy file of indices") from error
    return torch.as_tensor(np.asarray(indices)).long()
