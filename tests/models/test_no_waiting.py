"""A pass asks nothing of the device until its outputs are copied to the host.

Checked on torch's `meta` device, whose tensors have no values: whatever would read one fails.
Copies from the host must not wait either, which those of `torch.tensor(..., device=...)` and of
indexing by lists do on a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.inference import HeadCall, start_pass
from models.model import Model
from models.trunks.base import Trunk
from tests.models.test_fixtures import FIXTURES, fixture

META = torch.device("meta")
SOME = ("clip", "convnext_v2", "dino", "scale_mae", "vqt")
# Their heads need what a pass of images alone does not have.
OTHERS = ("vitgan", "vitgan_inr")


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on copies from the host that would wait for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func)
        if "_to_copy" in name or ".copy_" in name:
            source = args[1] if ".copy_" in name else args[0]
            moves = source.device.type == "cpu" and result.device == META
            waits = not kwargs.get("non_blocking", ".copy_" in name and True in args[2:])
            if moves and waits:
                raise AssertionError(f"{name} waits for a copy of {tuple(source.shape)}")
            return result
        if "lift_fresh" in name and result.device == META:
            raise AssertionError("a tensor of Python's numbers on the device: its copy waits")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.dim()}
        if len(devices) > 1:  # a GPU would copy an index, and refuse others
            raise AssertionError(f"{name} mixes tensors of host and device")
        return result


def to_meta(thing: Any, seen: set[int]) -> None:
    """Move all tensors that an object of the library holds to the meta device."""
    if id(thing) in seen or isinstance(thing, type | torch.device | torch.dtype):
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        thing.to(META)
    if isinstance(thing, dict):
        for key, value in thing.items():
            if isinstance(value, Tensor):
                thing[key] = value.to(META)
            else:
                to_meta(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            to_meta(value, seen)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith(("models", "timm")):
        to_meta(thing.__dict__, seen)


def on_meta(model: Model) -> Trunk:
    """The model's trunk and heads, moved."""
    trunk = model.trunk
    trunk.placement = replace(trunk.placement, device=META)
    trunk.engine.placement = trunk.placement
    seen: set[int] = set()
    to_meta(trunk, seen)
    bank = getattr(trunk, "_bank", None)
    if bank is not None and bank.tensors is not None:
        bank.tensors = tuple(tensor.to(META) for tensor in bank.tensors)
    to_meta(model.heads, seen)
    return trunk


def check(model: Model, batch: Tensor) -> None:
    trunk = on_meta(model)
    calls = [[HeadCall(head) for head in model.heads.values()] for _ in batch]
    calls[0] = calls[0][:1]  # so that heads run on some rows alone
    with NoWaiting():
        started = start_pass(trunk, batch.to(META, non_blocking=True), calls)
    assert started.tensors
    failed = [error for row in started._results for error in row if isinstance(error, Exception)]
    assert not failed, failed[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.nightly)
        for name in FIXTURES
        if name not in OTHERS
    ],
)
def test_a_pass_does_not_wait_for_the_device(name: str) -> None:
    model, golden, _ = fixture(name)
    if "pixel_values" not in golden:
        pytest.skip("takes no images")
    check(model, golden["pixel_values"][:1].repeat(3, *[1] * (golden["pixel_values"].dim() - 1)))


def test_what_waits_is_found() -> None:
    x = torch.empty(3, 2, device=META)
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        x[[0, 1]]
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        torch.tensor([1], device=META)
    with NoWaiting(), pytest.raises(AssertionError, match="mixes"):
        x[torch.tensor([0, 1])]
    with NoWaiting(), pytest.raises(RuntimeError):
        x.sum().item()
