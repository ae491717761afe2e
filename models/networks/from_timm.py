"""timm's classes that formats build from a checkpoint's shapes, not from a registered name."""

from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.pit import PoolingVisionTransformer
from timm.models.resnet import Bottleneck, ResNet
from timm.models.tnt import TNT
from timm.models.xcit import Xcit


def create_mixer(*, act_layer: str, **arguments: Any) -> MlpMixer:
    """timm's MLP-Mixer with an activation by its name."""
    return MlpMixer(act_layer=get_act_layer(act_layer), **arguments)


NETWORKS = {
    "cait": Cait,
    "convnext": ConvNeXt,
    "mixer": create_mixer,
    "pit": PoolingVisionTransformer,
    "resmlp": partial(MlpMixer, block_layer=ResBlock, norm_layer=Affine),
    "resnet": partial(ResNet, Bottleneck),
    "tnt": TNT,
    "xcit": Xcit,
}
