"""Published backbones of iBOT (arXiv 2111.07832) and AttMask (arXiv 2203.12719).

A ViT in timm's names, or a Swin in its authors', under `state_dict`, without other entries. A
student also has the embedding of masked patches. Upstream: github.com/bytedance/ibot,
github.com/gkakogeorgiou/attmask.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.vit import split_prefix

NAME = "ibot-backbone"
KEPT = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.", "masked_embed")
SWIN = ("patch_embed.", "layers.", "norm.", "masked_embed")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if container.wrapper != "state_dict" or container.beside or "architecture" in arguments:
        return None
    kind = backbone_kind(container.tensors)
    kept = {"ViT": KEPT, "Swin": SWIN}.get(kind or "")
    if kept and all(key.startswith(kept) for key in keys):
        return f"a {kind}, alone under state_dict, without a classifier"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    kept, dropped = split_prefix(container.tensors, "", drop=("masked_embed",))
    return backbone_checkpoint(NAME, kept, arguments, dropped=dropped)


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
