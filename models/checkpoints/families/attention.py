"""Outputs that several published formats have in common, besides the trunk's and the heads'."""

from collections.abc import Mapping

from torch import Tensor

from models.checkpoints.families.swin import swin_outputs
from models.model import Model
from models.networks.swin import Swin
from models.trunks.base import Trunk, TrunkOutput
from models.trunks.features import NOTHING, Need


def attention_need(trunk: Trunk) -> Need:
    """The attention of the last block of a ViT."""
    if not trunk.blocks:
        return NOTHING
    return Need(attention=frozenset({len(trunk.blocks) - 1}))


def attention_outputs(
    model: Model, output: TrunkOutput, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`attention` (B, heads, T, T): probabilities of the last block; of a Swin what
    `swin_outputs` gives."""
    if isinstance(model.trunk.network, Swin):
        return swin_outputs(model, output, inputs)
    found = list(output.attention.values())
    return {"attention": found[0]} if found else {}
