"""DINO's published linear classifiers (arXiv 2104.14294, github.com/facebookresearch/dino).

The file holds the classifier alone; the backbone is a companion file. Its input are, of a ViT, the
class tokens of the last four blocks or, if it takes twice the backbone's channels, the last class
token interleaved with the mean of the patch tokens; of a ResNet or XCiT their pooled output.
EsViT's (arXiv 2106.09785) have the same layout, and read the means of a Swin's, CvT's or
ViL's last blocks (of a ViL global tokens where it has them). So have iBOT's (arXiv 2111.07832),
where the mean patch token may be alone (without the final norm), or behind the class tokens of
several blocks; one of its scripts saves many classifiers and the number of the best one.
"""

import re
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
CLASSIFIER = {"linear.weight", "linear.bias"}
MANY = re.compile(r"^(\d+)\.(?:module\.)?(linear\.(?:weight|bias))$")
# A head's settings `mean` by avgpool_patchtokens: DINO's two ways of reading patch tokens, iBOT's.
MEANS = {None: False, "interleaved": True, "unnormed": 1, "appended": 2}
IBOTS = "0, 1 (the mean patch token alone) or 2 (behind the class tokens)"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.tensors.keys() == CLASSIFIER:
        return "nothing but linear.weight and linear.bias"
    if container.tensors and all(MANY.match(key) for key in container.tensors):
        return "nothing but numbered classifiers, as iBOT's script saves them"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, a path (`backbone.pth` beside the file), and what that needs;
    of a ViT `n_last_blocks` and `avgpool_patchtokens` (from the number of features): false or
    true in DINO's script, 0, 1 (the mean patch token alone) or 2 (behind the class tokens) in
    iBOT's; `classifier`, the number of one of many (the best).

    Raises:
        CheckpointError: the backbone is unknown, or has another number of features.
    """
    companion = open_companion(container, arguments, "backbone", BACKBONES)
    inner, _ = split_prefix(companion.tensors, "backbone.")
    kept, dropped = split_prefix(inner or companion.tensors, "", drop=HEADS)
    if backbone_kind(kept) not in ("ViT", "ResNet", "XCiT", "Swin", "CvT", "ViL"):
        raise CheckpointError(f"{companion.path}: not a backbone as DINO or EsViT publishes it")
    backbone = backbone_checkpoint(NAME, kept, arguments, dropped=dropped)
    weight, bias = _classifier(container, arguments)
    by_ibot = companion.wrapper == "state_dict" or "head.last_layer2.weight_v" in companion.tensors
    settings, assumed = _features(backbone, weight.shape[1], arguments, by_ibot)
    head = HeadState({"classifier.0.weight": weight, "classifier.0.bias": bias}, settings)
    return replace(backbone, heads={"linear": head}, assumed={**backbone.assumed, **assumed})


def _classifier(container: Container, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The classifier's weight and bias; of many those of the best.

    Raises:
        CheckpointError: it is not known which of them is the best.
    """
    tensors = container.tensors
    if tensors.keys() != CLASSIFIER:
        known = Known(arguments, container.beside)
        count = len({key.split(".")[0] for key in tensors})
        usual = f"0 to {count - 1}"
        number = whole("classifier", known.require("classifier", usual, "best_acc_hidx"), 0)
        matched = [(match, v) for k, v in tensors.items() if (match := MANY.match(k))]
        tensors = {match[2]: value for match, value in matched if int(match[1]) == number}
        if tensors.keys() != CLASSIFIER:
            raise CheckpointError(f"{container.path} has no classifier {number} of {count}")
    return tensors["linear.weight"], tensors["linear.bias"]


def _features(
    backbone: Checkpoint, count: int, arguments: Mapping[str, Any], by_ibot: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head's settings for a classifier of `count` features, and what is assumed."""
    built = backbone.arguments
    depths = built.get("depths", ())
    match backbone.architecture:
        case "vit":
            return _class_tokens(built["embed_dim"], count, arguments, by_ibot)
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
    width: int, count: int, arguments: Mapping[str, Any], by_ibot: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    times, rest = divmod(count, width)
    known = Known(arguments)
    if (stated := known.find("n_last_blocks")) is None:
        means = ["interleaved" if times == 2 else None]
        # no published classifier has as many features, or iBOT reads them in several ways
        is_unclear = bool(rest) or times not in (1, 2, 4) or (by_ibot and times != 4)
    else:
        blocks = whole("n_last_blocks", stated)
        means = [mean for mean in MEANS if times == _times(mean, blocks)] or [None]
        is_unclear = by_ibot and len(means) > 1
    if is_unclear:
        known.require("avgpool_patchtokens", f"false or true as DINO reads them, {IBOTS} as iBOT")
    mean = _mean(known.get("avgpool_patchtokens", MEANS[means[0]]))
    default = 1 if mean == "unnormed" else times - (mean is not None)
    blocks = whole("n_last_blocks", known.get("n_last_blocks", default))
    if rest or blocks < 1 or times != _times(mean, blocks):
        raise CheckpointError(
            f"linear.weight takes {count} features, which is not what {blocks} blocks of "
            f"{width} channels{' with the mean patch' if mean else ''} return; set n_last_blocks "
            f"and avgpool_patchtokens: false or true of DINO's classifiers, {IBOTS} of iBOT's"
        )
    return {"layers": list(range(-blocks, 0)), "mean": mean}, known.assumed


def _times(mean: str | None, blocks: int) -> int:
    """How many times the backbone's channels a classifier of so many blocks takes; 0 for none."""
    match mean:
        case "interleaved":
            return 2 if blocks == 1 else 0
        case "unnormed":
            return 1
        case "appended":
            return blocks + 1
    return blocks


def _mean(value: Any) -> str | None:
    """The head's setting `mean`, by true or false of DINO's script, 0, 1 or 2 of iBOT's."""
    if not isinstance(value, bool) and str(value) in ("0", "1", "2"):
        return (None, "unnormed", "appended")[int(value)]
    return "interleaved" if flag("avgpool_patchtokens", value) else None


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding`, the classifier's input, and `cls_embedding`, the backbone's pooled output."""
    head: Any = run.heads["classify"]
    return {"embedding": head.features(run.output), "cls_embedding": run.trunk.pool(run.output)}
