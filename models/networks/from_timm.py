"""timm's classes that formats build from a checkpoint's shapes, not from a registered name."""

from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.pit import PoolingVisionTransformer
from timm.models.tnt import TNT

NETWORKS = {
    "cait": Cait,
    "convnext": ConvNeXt,
    "pit": PoolingVisionTransformer,
    "tnt": TNT,
}
