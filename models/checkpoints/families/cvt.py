"""EsViT's CvT (arXiv 2106.09785): its network's arguments from the shapes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.known import Known, flag, wholes
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

MARK = "stage0.1.layers.0.0.fn.qkv.dw.weight"
TABLE = "stage{}.1.layers.0.0.fn.rel_pos_bias_table"
INDEX = ".rel_pos_idx"
PUBLISHED = [64, 192, 384, 768]  # widths of the only published network
STEM, PROJECTION = "stage0.0.stem.6.weight", "stage{}.0.proj.weight"


def cvt_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
) -> Checkpoint:
    """A CvT as a checkpoint of format `name`.

    Args:
        arguments: by stage, as in upstream's configurations, `num_heads` (channels / 64) and
            `window_size` (7), which only the published network may leave out, `patch_stride`
            (4, 2, 2, 2), `patch_padding` (2, 1, 1, 1) and `shift` (false), and `img_size` in pixels
            (224). Those that are assumed are the published network's.
        dropped: keys that only training used.

    Raises:
        CheckpointError: an argument does not fit the stages.
    """
    if not {STEM, PROJECTION.format(0)} & tensors.keys():
        raise CheckpointError("a CvT's stem has one convolution, or three; neither is in the file")
    known = Known(arguments)
    count = len({key.split(".")[0] for key in tensors if key.startswith("stage")})
    stages = range(count)
    shapes = [
        tensors[STEM if STEM in tensors and not s else PROJECTION.format(s)].shape for s in stages
    ]
    dims = [shape[0] for shape in shapes]
    relative = TABLE.format(0) in tensors
    windows = [7] * count
    if relative:
        windows = [round((len(tensors[TABLE.format(s)]) ** 0.5 + 1) / 2) for s in stages]
    elif dims == PUBLISHED:
        windows = _by_stage("window_size", known.get("window_size", windows), count)
    else:
        stated = known.require("window_size", "7 or 14 cells, or a list by stage")
        windows = _by_stage("window_size", stated, count)
    usual = [max(1, dim // 64) for dim in dims]
    if relative:
        heads = [tensors[TABLE.format(s)].shape[1] for s in stages]
    elif dims == PUBLISHED:
        heads = _by_stage("num_heads", known.get("num_heads", usual), count)
    else:
        stated = known.require("num_heads", f"a list by stage, such as {usual}")
        heads = _by_stage("num_heads", stated, count)
    if any(dim % number for dim, number in zip(dims, heads, strict=True)):
        raise CheckpointError(f"num_heads are {heads}; each must divide its stage's width, {dims}")
    shift = known.get("shift", False)  # nothing in the file tells
    shifts = list(shift) if isinstance(shift, list | tuple) else [shift] * count
    if len(shifts) != count:
        raise CheckpointError(f"shift is {shift}; it needs a value for each of {count} stages")
    block = "stage{}.1.layers."
    head = tensors.get("head.weight")
    return Checkpoint(
        format=name,
        architecture="cvt",
        library=OWN,
        arguments={
            "dims": dims,
            "depths": [
                len({k.split(".")[3] for k in tensors if k.startswith(block.format(stage))})
                for stage in stages
            ],
            "hidden": [
                tensors[f"stage{stage}.1.layers.0.1.fn.net.0.weight"].shape[0] for stage in stages
            ],
            "heads": heads,
            "windows": windows,
            "kernels": [shape[-1] for shape in shapes],
            "strides": _by_stage(
                "patch_stride", known.get("patch_stride", [4, 2, 2, 2][:count]), count
            ),
            "paddings": _by_stage(
                "patch_padding", known.get("patch_padding", [2, 1, 1, 1][:count]), count, 0
            ),
            "bias": "stage0.1.layers.0.0.fn.qkv.pw.bias" in tensors,
            "relative": relative,
            "shift": [flag("shift", each) for each in shifts],
            "conv_stem": STEM in tensors,
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict={key: value for key, value in tensors.items() if not key.endswith(INDEX)},
        preprocess=replace(preprocess or Preprocess(), input_size=known.image_size()),
        dropped=(*dropped, *(key for key in tensors if key.endswith(INDEX))),
        assumed=known.assumed,
    )


def _by_stage(name: str, value: Any, count: int, least: int = 1) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise CheckpointError(f"{name} is {value}; it needs a value for each of {count} stages")
    return wholes(name, values, least)
