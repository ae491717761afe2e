"""Architectures that no library has, or has with other habits: one file each."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
from torch import nn

from models.checkpoints.checkpoint import Checkpoint

OWN = "vitrail"


def create_network(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint, without its weights: timm's, or one of this package's."""
    if checkpoint.library == "timm":
        network: nn.Module = timm.create_model(checkpoint.architecture, **checkpoint.arguments)
    else:
        network = create_own(checkpoint.architecture, **checkpoint.arguments)
    return network


def create_own(architecture: str, **arguments: Any) -> nn.Module:
    """A network of this package, by name."""
    network: nn.Module = _own()[architecture](**arguments)
    return network


def _own() -> Mapping[str, Callable[..., Any]]:
    from timm.models.beit import Beit
    from timm.models.cait import Cait
    from timm.models.convnext import ConvNeXt
    from timm.models.pit import PoolingVisionTransformer
    from timm.models.tnt import TNT

    from models.networks.dhvt import Dhvt
    from models.networks.ms_clip import MsClipImage
    from models.networks.mvit import TokenMvit, image_mvit
    from models.networks.patchconvnet import PatchConvNet
    from models.networks.pyramid_tnt import PyramidTnt
    from models.networks.scale_vit import ScaleVit
    from models.networks.swin import Swin
    from models.networks.vit import ProjectedVit, Vit
    from models.networks.vitgan import VitGan

    return {
        "beit": Beit,
        "cait": Cait,
        "convnext": ConvNeXt,
        "dhvt": Dhvt,
        "ms-clip-image": MsClipImage,
        "mvit-images": image_mvit,
        "mvit-tokens": TokenMvit,
        "patchconvnet": PatchConvNet,
        "projected-vit": ProjectedVit,
        "pit": PoolingVisionTransformer,
        "pyramid-tnt": PyramidTnt,
        "scale-vit": ScaleVit,
        "swin": Swin,
        "tnt": TNT,
        "vit": Vit,
        "vitgan": VitGan,
    }
