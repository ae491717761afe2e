"""The last block's attention maps, which several self-supervised formats return."""

from torch import Tensor

from models.checkpoints.families.swin import swin_outputs
from models.networks.swin import Swin
from models.reference_outputs import ReferenceRun
from models.trunks.base import Trunk
from models.trunks.features import NO_EXTRAS, FeatureRequest


def attention_request(trunk: Trunk) -> FeatureRequest:
    """The last block's attention of a ViT; nothing of other trunks."""
    if not trunk.blocks:
        return NO_EXTRAS
    return FeatureRequest(attention=frozenset({len(trunk.blocks) - 1}))


def attention_outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`feature_map` (B, D, h, w), and of a ViT `attention`, the last block's probabilities
    (B, heads, T, T); of a Swin `swin_outputs`."""
    if isinstance(run.network, Swin):
        return swin_outputs(run)
    maps = list(run.output.attention.values())
    attention = {"attention": maps[0]} if maps else {}
    return {"feature_map": run.output.feature_map_BChw} | attention
