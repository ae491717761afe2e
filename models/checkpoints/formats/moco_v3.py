"""MoCo v3's pre-training (arXiv 2104.02057, github.com/facebookresearch/moco-v3).

Base and momentum encoder, projectors and predictor. The base encoder is served, as upstream's
scripts transfer it; `weights="momentum"` selects the momentum encoder. The stem may be
convolutional. Both published ViTs have 12 heads. ResNet-50 is nested in the same way.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.vit import STEM, split_prefix
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

NAME = "moco-v3"
HEADS = {384: 12, 768: 12}  # of the published sizes


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    encoders = ("base_encoder.", "momentum_encoder.")
    kinds = {backbone_kind(split_prefix(container.tensors, prefix)[0]) for prefix in encoders}
    if kinds in ({"ViT"}, {"ResNet"}):
        return f"base_encoder and momentum_encoder, each a {kinds.pop()}"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    weights = str(arguments.get("weights", "base"))
    prefix = f"{weights.removesuffix('_encoder')}_encoder."
    kept, dropped = split_prefix(container.tensors, prefix, drop=("head.", "fc."))
    if not kept:
        raise CheckpointError(f"{container.path} has no weights {weights!r}; base or momentum")
    return backbone_checkpoint(
        NAME,
        kept,
        arguments,
        published=HEADS,
        positions="fixed",
        preprocess=Preprocess(interpolation="bilinear"),
        dropped=dropped,
        conv_stem=STEM in kept,
    )


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
