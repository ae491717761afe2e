"""Puts an adapter on a trunk, and checks that its passes apply it, row by row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.errors import CheckpointError
from models.trunks.adapters import Adapter, Pair
from models.trunks.base import Trunk
from models.trunks.features import BatchRequest
from models.trunks.weights import state_digest

TOLERANCE = 1e-4


@torch.inference_mode()
def create_adapter(trunk: Trunk, matrices: Mapping[str, Pair]) -> Adapter:
    """An adapter for a trunk, on its device.

    Args:
        matrices: A (R, I) and B (O, R) by the layer's name, B with the scale multiplied in.

    Raises:
        CheckpointError: the trunk has no such layers, or does not run them in a way that rows can
            have adapters of their own.
    """
    if trunk.modality != "image" or trunk.takes_gsd:
        raise CheckpointError(f"{trunk.architecture} takes no adapters")
    trunk.adapters.check(matrices)
    named = {f"{name}.{half}": pair[n] for name, pair in matrices.items() for n, half in PARTS}
    placement = trunk.placement
    pairs = {
        name: (down.to(placement.device, placement.dtype), up.to(placement.device, placement.dtype))
        for name, (down, up) in matrices.items()
    }
    adapter = Adapter(pairs, state_digest(named))
    _check_rows(trunk, adapter)
    return adapter


PARTS = ((0, "A"), (1, "B"))


def _check_rows(trunk: Trunk, adapter: Adapter) -> None:
    """Run two rows, the first one with the adapter and the second one without."""
    batch = trunk.collate(trunk.samples(2))
    without = Adapter({}, "")
    plain = _features(trunk, batch, without)
    try:
        adapted = _features(trunk, batch, adapter)
    except RuntimeError as error:
        raise CheckpointError(f"the adapter cannot be applied: {error}") from error
    if idle := [name for name in adapter.pairs if name not in adapter.ran]:
        raise CheckpointError(f"a pass of the trunk does not call {', '.join(idle)[:200]}")
    if not bool(adapted.isfinite().all()):
        raise CheckpointError("with the adapter the trunk's output is not finite")
    scale = plain.abs().max().clamp(min=1e-12)
    if float((adapted[1] - plain[1]).abs().max() / scale) > TOLERANCE:
        raise CheckpointError("the trunk's layers mix the rows of a batch")


def _features(trunk: Trunk, batch: Tensor, adapter: Adapter) -> Tensor:
    """The last output of a batch of two, whose first row has an adapter."""
    request = BatchRequest(adapters=((adapter, (0,)),))
    return trunk.forward(batch, request).features.float()
