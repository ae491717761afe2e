"""Backbones that self-supervised methods train, told apart by their keys.

One training script trains several of them, and nests them in the same way.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families import cvt, resnet, swin, vil, vit, xcit
from models.checkpoints.families.cait import CAIT, cait_checkpoint
from models.checkpoints.families.known import Known
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess


def backbone_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """What a state dict in its authors' names is, or None for none of these."""
    keys = tensors.keys()
    stem = vit.PATCHES if vit.PATCHES in keys else vit.STEM
    if keys >= (vit.MARKS - {vit.PATCHES}) | {stem} and CAIT not in keys:
        return None if "blocks.0.ls1.gamma" in keys or "blocks.0.gamma_1" in keys else "ViT"
    if keys >= resnet.MARKS:
        return "ResNet"
    for mark, kind in (
        (CAIT, "CaiT"),
        (xcit.MARK, "XCiT"),
        (swin.MARK, "Swin"),
        (cvt.MARK, "CvT"),
        (vil.MARK, "ViL"),
    ):
        if mark in keys:
            return kind
    return None


def backbone_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    positions: str = "dino",
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
    img_size: int = 224,
    **plain: Any,
) -> Checkpoint:
    """A backbone as a checkpoint of format `name`.

    Args:
        arguments: those of its family.
        positions: of a ViT, see `vit_checkpoint`.
        preprocess: everything but the input size.
        dropped: keys that only training used.
        img_size: of a Swin without `img_size`.
        plain: of a ViT, further arguments of `vit_checkpoint`.

    Raises:
        CheckpointError: not one of these backbones.
    """
    shared: dict[str, Any] = {"preprocess": preprocess, "dropped": dropped}
    match backbone_kind(tensors):
        case "ViT":
            return vit.vit_checkpoint(
                name, tensors, arguments, positions=positions, **shared, **plain
            )
        case "CaiT":
            return cait_checkpoint(
                name, tensors, preprocess=preprocess or Preprocess(), dropped=dropped
            )
        case "ResNet":
            return resnet.resnet_checkpoint(name, tensors, Known(arguments), **shared)
        case "XCiT":
            return xcit.xcit_checkpoint(name, tensors, Known(arguments), **shared)
        case "Swin":
            return swin.swin_checkpoint(name, tensors, arguments, img_size=img_size, **shared)
        case "CvT":
            return cvt.cvt_checkpoint(name, tensors, arguments, **shared)
        case "ViL":
            return vil.vil_checkpoint(name, tensors, arguments, **shared)
    keys = ", ".join(list(tensors)[:5])
    raise CheckpointError(
        f"not a whole ViT, CaiT, ResNet, XCiT, Swin, CvT or ViL; its keys begin with {keys}"
    )
