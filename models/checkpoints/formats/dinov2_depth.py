"""DINOv2's depth estimators (arXiv 2304.07193, github.com/facebookresearch/dinov2): linear heads on
one or four blocks, and DPT heads.

The file has the head alone; the backbone is a companion file. Inputs are padded with zeros on all
sides to whole patches, and depth is resized to the input, padding included.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.dinov2 import dinov2_checkpoint, open_backbone
from models.checkpoints.families.known import Known, number, whole
from models.checkpoints.families.vit import split_prefix
from models.errors import CheckpointError

NAME = "dinov2-depth"
HEAD = "decode_head."
LINEAR, DPT = f"{HEAD}conv_depth.weight", f"{HEAD}conv_depth.head.0.weight"
# By the number of blocks those that upstream's heads of four levels read.
BLOCKS = {12: [2, 5, 8, 11], 24: [4, 11, 17, 23], 40: [9, 19, 29, 39]}
# NYU's images, which the heads were trained and evaluated with.
SCALE = (640, 480)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {LINEAR, DPT} & keys and all(key.startswith(HEAD) for key in keys):
        return "nothing but a decode_head with conv_depth"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, a path (`backbone.pth` beside the file); `out_index`, the blocks
    that the head reads; `min_depth` (0.001) and `max_depth` in metres (80 of linear heads, as the
    hub builds them all); `upsample` of linear heads (4); and the backbone's.

    Raises:
        CheckpointError: the backbone is not DINOv2's or does not fit, or something is not known.
    """
    head, _ = split_prefix(container.tensors, HEAD)
    backbone = open_backbone(container, arguments)
    checkpoint = dinov2_checkpoint(NAME, backbone, arguments, padding="center", whole_patches=False)
    depth, dim = (checkpoint.arguments[name] for name in ("depth", "embed_dim"))
    known = Known(arguments)
    settings: dict[str, Any] = {"minimum": known.get("min_depth", 0.001), "scale": list(SCALE)}
    known.assumed["scale"] = list(SCALE)
    if LINEAR in container.tensors:
        bins, features = head["conv_depth.weight"].shape[:2]
        count, rest = divmod(features, 2 * dim)
        if rest or bins < 2:
            raise CheckpointError(
                f"the linear head has {bins} outputs of {features} features; supported: bins of "
                f"depth, of patches and class tokens of {dim} channels"
            )
        settings["upsample"] = whole("upsample", known.get("upsample", 4))
        settings["maximum"] = known.get("max_depth", 80)
    else:
        count = 4
        usual = "10 of NYU's heads, 80 of KITTI's"
        settings["maximum"] = known.require("max_depth", usual)
    least = number("min_depth", settings["minimum"])
    most = number("max_depth", settings["maximum"])
    if not 0 <= least < most:
        raise CheckpointError(
            f"min_depth is {least:g} and max_depth {most:g}; depths are not below 0, and the "
            "first is the smaller one"
        )
    settings["layers"] = _blocks(known, depth, count)
    return replace(
        checkpoint,
        heads={"depth": HeadState(head, settings)},
        assumed={**checkpoint.assumed, **known.assumed},
    )


def _blocks(known: Known, depth: int, count: int) -> list[int]:
    """The blocks that a head of `count` levels reads."""
    if count == 1:
        value = known.get("out_index", [depth - 1], "out_indices")
    elif count == 4 and depth in BLOCKS:
        value = known.get("out_index", BLOCKS[depth], "out_indices")
    else:
        usual = f"{count} of {depth} blocks, such as {list(range(depth))[-count:]}"
        value = known.require("out_index", usual, "out_indices")
    numbers = [value] if isinstance(value, int) else [int(n) for n in value]
    if len(numbers) != count or any(not -depth <= n < depth for n in numbers):
        raise CheckpointError(f"out_index is {numbers}; the head reads {count} of {depth} blocks")
    return [n % depth for n in numbers]
