"""DINO's published linear classifiers (arXiv 2104.14294, github.com/facebookresearch/dino).

The file holds the classifier alone; the backbone is a companion file. Its input are, of a ViT, the
class tokens of the last four blocks or, if it takes twice the backbone's channels, the last class
token interleaved with the mean of the patch tokens; of a ResNet or XCiT their pooled output.
EsViT's (arXiv 2106.09785) have the same layout, and read the means of a Swin's, CvT's or
ViL's last blocks (of a ViL global tokens where it has them).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import open_companion
from models.checkpoints.families.known import Known, flag, whole
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.vit import split_prefix
from models.errors import CheckpointError
from models.reference_outputs import ReferenceRun

NAME = "dino-linear"
BACKBONES = ("backbone.pth", "backbone.safetensors")
HEADS = ("head.", "head_dense.")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.tensors.keys() == {"linear.weight", "linear.bias"}:
        return "nothing but linear.weight and linear.bias"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, a path (`backbone.pth` beside the file), and what that needs;
    of a ViT `n_last_blocks` and `avgpool_patchtokens` (from the number of features).

    Raises:
        CheckpointError: the backbone is unknown, or has another number of features.
    """
    companion = open_companion(container, arguments, "backbone", BACKBONES)
    inner, _ = split_prefix(companion.tensors, "backbone.")
    kept, dropped = split_prefix(inner or companion.tensors, "", drop=HEADS)
    if backbone_kind(kept) not in ("ViT", "ResNet", "XCiT", "Swin", "CvT", "ViL"):
        raise CheckpointError(f"{companion.path}: not a backbone as DINO or EsViT publishes it")
    backbone = backbone_checkpoint(NAME, kept, arguments, dropped=dropped)
    weight, bias = container.tensors["linear.weight"], container.tensors["linear.bias"]
    settings, assumed = _features(backbone, weight.shape[1], arguments)
    head = HeadState({"classifier.0.weight": weight, "classifier.0.bias": bias}, settings)
    return replace(backbone, heads={"linear": head}, assumed={**backbone.assumed, **assumed})


def _features(
    backbone: Checkpoint, count: int, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head's settings for a classifier of `count` features, and what is assumed."""
    built = backbone.arguments
    depths = built.get("depths", ())
    match backbone.architecture:
        case "vit":
            return _class_tokens(built["embed_dim"], count, arguments)
        case "swin":
            widths = [built["embed_dim"] * 2**stage for stage in range(len(built["depths"]))]
        case "cvt":
            widths = built["dims"]
        case "vil":
            widths = [stage["dim"] for stage in built["stages"]]
            depths = [stage["depth"] for stage in built["stages"]]
        case "xcit":
            return _pooled(built["embed_dim"], count)
        case _:
            return _pooled(4 * built["channels"][-1], count)
    widths = [w for w, depth in zip(widths, depths, strict=True) for _ in range(depth)]
    for blocks in range(1, len(widths) + 1):
        if sum(widths[-blocks:]) == count:
            return {"last_blocks": blocks}, {}
    raise CheckpointError(f"linear.weight takes {count} features; blocks have {widths} channels")


def _pooled(width: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    if count != width:
        raise CheckpointError(f"linear.weight takes {count} features; the backbone has {width}")
    return {}, {}


def _class_tokens(
    width: int, count: int, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    times = count / width
    known = Known(arguments)
    mean = flag("avgpool_patchtokens", known.get("avgpool_patchtokens", times == 2))
    blocks = whole("n_last_blocks", known.get("n_last_blocks", int(1 if mean else times)))
    if times != blocks * (1 + mean) or (mean and blocks != 1):
        raise CheckpointError(
            f"linear.weight takes {count} features, which is not what {blocks} blocks of "
            f"{width} channels{' with the mean patch' if mean else ''} return; set "
            "n_last_blocks and avgpool_patchtokens"
        )
    settings = {
        "layers": list(range(-blocks, 0)),
        "mean": "interleaved" if mean else None,
    }
    return settings, known.assumed


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding`, the classifier's input, and `cls_embedding`, the backbone's pooled output."""
    head: Any = run.heads["classify"]
    return {"embedding": head.features(run.output), "cls_embedding": run.trunk.pool(run.output)}
