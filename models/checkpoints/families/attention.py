"""Outputs that several published formats have in common, besides the trunk's and the heads'."""

from torch import Tensor

from models.checkpoints.families.swin import swin_outputs
from models.networks.swin import Swin
from models.reference_outputs import ReferenceRun
from models.trunks.base import Trunk
from models.trunks.features import NO_EXTRAS, FeatureRequest


def attention_request(trunk: Trunk) -> FeatureRequest:
    """The attention of the last block of a ViT."""
    if not trunk.blocks:
        return NO_EXTRAS
    return FeatureRequest(attention=frozenset({len(trunk.blocks) - 1}))


def attention_outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`attention` (B, heads, T, T): probabilities of the last block; of a Swin what
    `swin_outputs` gives."""
    if isinstance(run.network, Swin):
        return swin_outputs(run)
    found = list(run.output.attention.values())
    return {"attention": found[0]} if found else {}
