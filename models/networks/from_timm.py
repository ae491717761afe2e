"""timm's classes that formats build from a checkpoint's shapes, not from a registered name."""

from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.pit import PoolingVisionTransformer
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tnt import TNT
from timm.models.xcit import Xcit
from torch import nn


def create_mixer(*, act_layer: str, **arguments: Any) -> MlpMixer:
    """timm's MLP-Mixer with an activation by its name."""
    return MlpMixer(act_layer=get_act_layer(act_layer), **arguments)


def create_convnext(*, head_norm_eps: float | None = None, **arguments: Any) -> ConvNeXt:
    """timm's ConvNeXt, with an own epsilon of the norm after the pooling, if there is one."""
    network = ConvNeXt(**arguments)
    if head_norm_eps is not None:
        network.head.norm.eps = head_norm_eps
    return network


def create_eva(*, norm_eps: float, **arguments: Any) -> Eva:
    """timm's ViT with rotary positions, with an epsilon of every layer norm."""
    return Eva(norm_layer=partial(nn.LayerNorm, eps=norm_eps), **arguments)


NETWORKS = {
    "cait": Cait,
    "convnext": create_convnext,
    "eva": create_eva,
    "mixer": create_mixer,
    "pit": PoolingVisionTransformer,
    "resmlp": partial(MlpMixer, block_layer=ResBlock, norm_layer=Affine),
    "resnet": partial(ResNet, Bottleneck),
    "resnet-basic": partial(ResNet, BasicBlock),
    "swin-v2": SwinTransformerV2,
    "tnt": TNT,
    "xcit": Xcit,
}
