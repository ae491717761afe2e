"""DINOv2's linear heads for segmentation (arXiv 2304.07193, github.com/facebookresearch/dinov2).

The file of mmcv's runner has the head alone; the backbone is a companion file. The head reads the
last block, or the last four (upstream's multi-scale heads), each after the final norm. Windows are
padded with zeros on all sides to whole patches, and their logits resized to the window, padding
included.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.backbones import out_indices
from models.checkpoints.families.dinov2 import dinov2_checkpoint, open_backbone
from models.checkpoints.families.segmentors import SCALE, read_segmentor
from models.checkpoints.formats import mmseg
from models.errors import CheckpointError
from models.segmentation.decoders import class_count

NAME = "dinov2-segmentation"
HEAD = "decode_head."


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {f"{HEAD}conv_seg.weight", f"{HEAD}bn.weight"} <= keys and all(
        key.startswith(HEAD) for key in keys
    ):
        return "nothing but a decode_head with bn and conv_seg"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, a path (`backbone.pth` beside the file); `decode_head`, `test_cfg`
    and `out_indices` of an mmsegmentation configuration, of which the file's own has the defaults;
    and the backbone's.

    Raises:
        CheckpointError: the backbone is not DINOv2's or does not fit, or something is not known.
    """
    tensors = container.tensors
    config = read_segmentor(container, {k: v for k, v in arguments.items() if k != "backbone"})
    backbone = open_backbone(container, arguments)
    checkpoint = dinov2_checkpoint(NAME, backbone, arguments, padding="center", whole_patches=False)
    depth, dim = (checkpoint.arguments[name] for name in ("depth", "embed_dim"))
    count, rest = divmod(tensors[f"{HEAD}conv_seg.weight"].shape[1], dim)
    if rest or not 1 <= count <= depth:
        raise CheckpointError(f"the head does not read blocks of {dim} channels")
    if config.decode_head.find("resize_factors") is not None:
        raise CheckpointError("decode_head.resize_factors is set; supported: maps of one size")
    table = config.backbone
    if "out_indices" in arguments:
        table.values = {**table.values, "out_indices": arguments["out_indices"]}
    last = list(range(depth - count, depth))
    if table.find("out_indices") is None:
        config.assumed["out_indices"] = last
        table.values = {**table.values, "out_indices": last}
    layers = out_indices(table, depth, last)
    settings = {
        "layers": layers,
        "inputs": [dim] * len(layers),
        "normed": True,
        **mmseg.labels(config, class_count(tensors)),
        **mmseg.decoder_settings(config, tensors, len(layers), every=True),
        "windows": mmseg.windows(config, None),
    }
    served = mmseg.preprocess(config, min(config.scale or SCALE))
    assert checkpoint.preprocess is not None
    return replace(
        checkpoint,
        heads={"semantic": HeadState(dict(tensors), settings)},
        preprocess=replace(checkpoint.preprocess, mean=served.mean, std=served.std),
        assumed={**checkpoint.assumed, **config.assumed},
    )
