"""EsViT's ViL (arXiv 2103.15358): its network's arguments from the shapes."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.known import Known, whole
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

MARK = "layer1.1.attn.proj.weight"
INDEX = ".relative_position_index"
TABLE = "attn.local_relative_position_bias_table"
# What shapes do not tell; all of upstream's configurations have these.
PUBLISHED = {"avg_pool": False, "only_glo": False, "sw_exact": 0, "ln_eps": 1e-6}
ALIASES = {"only_glo": ("only_global",), "ln_eps": ("norm_eps",)}


def vil_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
) -> Checkpoint:
    """A ViL as a checkpoint of format `name`.

    Args:
        arguments: `arch`, upstream's description of the stages, for those without tables of
            relative positions, which tell heads and windows; `img_size` in pixels, one side (from
            tables and positions, else 224). Others must be as published, and are assumed.
        dropped: keys that only training used.

    Raises:
        CheckpointError: `arch` is needed or does not fit, or an option is not the published.
    """
    known = Known({n.lower(): value for n, value in arguments.items()})
    for option, value in PUBLISHED.items():
        if (stated := known.get(option, value, *ALIASES.get(option, ()))) != value:
            raise CheckpointError(f"{option} is {stated!r}; ViLs are supported with {value!r}")
    whole("mode", known.get("mode", 0), 0)  # below 0, patches see other windows than those around
    arch = known.find("arch")
    described = _described(str(arch)) if isinstance(arch, str) and "," in arch else None
    count = len({key.split(".")[0] for key in tensors if re.match(r"layer\d+\.", key)})
    if described is not None and len(described) != count:
        raise CheckpointError(f"arch has {len(described)} stages; the weights have {count}")
    stages, size, stride = [], None, 1
    for number in range(1, count + 1):
        part = {
            key.removeprefix(f"layer{number}."): value
            for key, value in tensors.items()
            if key.startswith(f"layer{number}.")
        }
        stage = _stage(number, part, described[number - 1] if described else None)
        stride *= stage["patch"]
        if stage["grid"] or (stage["table"] and not stage["sliding"]):
            size = stride * (stage["grid"][0] if stage["grid"] else stage["table"])
        stages.append(stage)
    if stages[-1]["tokens"]:
        raise CheckpointError("the last stage has global tokens; ViLs are supported without them")
    head = tensors.get("head.weight")
    sizes = known.image_size() if size is None else (size, size)
    return Checkpoint(
        format=name,
        architecture="vil",
        library=OWN,
        arguments={"stages": stages, "num_classes": 0 if head is None else head.shape[0]},
        state_dict={key: value for key, value in tensors.items() if not key.endswith(INDEX)},
        preprocess=replace(preprocess or Preprocess(), input_size=sizes),
        dropped=(*dropped, *(key for key in tensors if key.endswith(INDEX))),
        assumed=known.assumed,
    )


def _described(arch: str) -> list[dict[str, int]]:
    """Upstream's description of the stages: a letter and a number for each attribute."""
    stages = []
    for text in arch.split("_"):
        stage = {"h": 3, "f": 7}
        for attribute in text.split(","):
            if not re.fullmatch(r"[a-z]\d+", attribute):
                raise CheckpointError(f"arch is {arch!r}; each stage is like 'l1,h3,d96,n2,s1,g1'")
            stage[attribute[0]] = int(attribute[1:])
        stages.append(stage)
    return stages


def _stage(
    number: int, tensors: Mapping[str, Tensor], described: Mapping[str, int] | None
) -> dict[str, Any]:
    """A stage of `Vil`."""
    dim, _, _, patch = tensors["0.proj.weight"].shape
    blocks = len({key.split(".")[0] for key in tensors}) - 1
    sliding = "1.attn.query.weight" in tensors
    tokens = tensors["0.cls_token"].shape[1] if "0.cls_token" in tensors else 0
    grid = [tensors[f"0.{axis}_pos_embed"].shape[1] for axis in "xy" if "0.x_pos_embed" in tensors]
    side, window = 0, 0
    if (table := tensors.get(f"1.{TABLE}")) is not None:
        rows, heads = table.shape
        side = round((rows**0.5 + 1) / (4 if sliding else 2))
        window = side if sliding else 0
    elif described is None:
        raise CheckpointError(
            f"heads and windows of stage {number} are not in the weights; set arch to the "
            "configuration's MODEL.SPEC.MSVIT.ARCH, such as 'l1,h3,d96,n2,s1,g1,p4,f7_l2,...'"
        )
    else:
        heads, window = described["h"], described["f"] if sliding else 0
    if described is not None and heads != described["h"]:
        raise CheckpointError(f"stage {number} has {heads} heads; arch has {described['h']}")
    if heads < 1 or dim % heads or (sliding and window < 1):
        raise CheckpointError(f"arch has {heads} heads of {dim} channels, windows of {window}")
    first = "1.attn.query.bias" if sliding else "1.attn.qkv.bias"
    return {
        "dim": dim,
        "depth": blocks // 2,
        "heads": heads,
        "hidden": tensors["2.mlp.fc1.weight"].shape[0],
        "patch": patch,
        "tokens": tokens,
        "norm": "0.norm_embed.weight" in tensors,
        "grid": grid,
        "bias": first in tensors,
        "sliding": sliding,
        "window": window,
        "table": side,
    }
