"""A pass asks nothing of the device until its outputs are copied to the host.

Checked with torch's fake tensors, which can be on `cuda:0` where there is no GPU, and have no
values: whatever would read one fails, and so does what mixes tensors of host and device. Copies
from the host must not wait either, which those of `torch.tensor(..., device=...)` and of indexing
by lists do on a GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from models.checkpoints.checkpoint import HeadState
from models.heads.embed import Embed
from models.heads.registry import create_head
from models.inference import HeadCall, start_pass
from models.model import Model
from models.trunks.adapters import Adapter
from models.trunks.base import Trunk
from tests.models.test_fixtures import FIXTURES, fixture

GPU = torch.device("cuda", 0)
SOME = ("clip", "convnext_v2", "dino", "mvit", "scale_mae", "vqt")


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on copies between host and device that would wait for them."""

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
            moves = source.device != result.device
            waits = not kwargs.get("non_blocking", ".copy_" in name and True in args[2:])
            if moves and waits:
                raise AssertionError(f"{name} waits for a copy of {tuple(source.shape)}")
        elif "index" in name and args[1:] and isinstance(args[1], list | tuple):
            tensors = [part for part in args[1] if isinstance(part, Tensor)]
            if any(tensor.device != args[0].device for tensor in tensors):
                raise AssertionError(f"{name} waits for a copy of its index")
        return result


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Fake tensors on a GPU, with stand-ins for what needs a driver: pinning, and streams."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode:
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        patch.setattr(Tensor, "record_stream", lambda self, stream: None)
        # its real values would be copied to the real device
        patch.setattr("torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT", 0)
        stream = SimpleNamespace(synchronize=lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        yield mode


class Mover:
    """Moves all tensors that objects of the library hold to the fake GPU."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._seen: set[int] = set()

    def tensor(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            return self._mode.from_tensor(tensor).to(GPU)

    def move(self, thing: Any) -> None:
        if id(thing) in self._seen or isinstance(thing, type | torch.device | torch.dtype):
            return
        self._seen.add(id(thing))
        if isinstance(thing, dict):
            for key, value in thing.items():
                if isinstance(value, nn.Parameter):
                    thing[key] = nn.Parameter(self.tensor(value), requires_grad=False)
                elif isinstance(value, Tensor):
                    thing[key] = self.tensor(value)
                elif isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
                    thing[key] = tuple(self.tensor(each) for each in value)
                else:
                    self.move(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                self.move(value)
        elif isinstance(thing, nn.Module) or (
            hasattr(thing, "__dict__") and type(thing).__module__.startswith(("models", "timm"))
        ):
            self.move(thing.__dict__)


def check(trunk: Trunk, batch: Tensor, calls: Sequence[Sequence[HeadCall]], *others: Any) -> None:
    """Move a trunk, heads and other things to a fake GPU, and start a pass."""
    with fake_gpu() as mode:
        trunk.placement = replace(trunk.placement, device=GPU)
        trunk.engine.placement = trunk.placement
        mover = Mover(mode)
        mover.move(trunk)
        mover.move([call.head for row in calls for call in row])
        mover.move(others)
        on_host = mode.from_tensor(batch)
        with NoWaiting():
            started = start_pass(trunk, on_host, calls)
        assert started.tensors
        assert all(tensor.device == GPU for tensor in started.tensors)
    assert not started.errors()


def options_of(model: Model) -> list[tuple[str, Mapping[str, Any]]]:
    """Each task of the model with options of `forward` that change what it computes."""
    trunk = model.trunk
    variants: list[tuple[str, Mapping[str, Any]]] = [(task, {}) for task in model.heads]
    if "embed" in model.heads and trunk.has_tokens and not trunk.takes_gsd:
        variants += [("embed", {"pooling": pooling}) for pooling in ("mean", "max", "gem")]
        variants += [("embed", {"output": "tokens", "prefix": True})]
    if trunk.takes_gsd:
        variants += [("embed", {"gsd": 0.3})]
    elif "embed" in model.heads and trunk.layer_count:
        variants += [("embed", {"output": "tokens", "layers": [0, trunk.layer_count - 1]})]
    if "reconstruct" in model.heads:
        variants += [("reconstruct", {"mask_ratio": 0.5, "seed": 3})]
    return variants


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SOME else pytest.mark.nightly) for name in FIXTURES],
)
def test_a_pass_does_not_wait_for_the_device(name: str) -> None:
    model, golden, _ = fixture(name)
    trunk, text = model.trunk, model.text
    batch = golden.get("pixel_values")
    if batch is None:  # texts, latents, clips
        batch = trunk.collate([trunk.blank()])
    if text is not None and text is not trunk and model.text_embed is not None:
        texts = text.collate([text.blank()] * 2)
        check(text, texts, [[HeadCall(model.text_embed)]] * 2)
    row = []
    for task, options in options_of(model):
        head = model.heads[task]
        if not options or not head.network:
            row.append(HeadCall.of(head, options))
    calls = [row[:1], row, row]  # so that heads run on some rows alone
    check(trunk, batch[:1].repeat(3, *[1] * (batch.dim() - 1)), calls)


def test_mixed_heads_with_query_tokens_do_not_wait() -> None:
    model, golden, _ = fixture("vqt")
    trunk = model.trunk
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
    heads = []
    for tokens, chosen in ((1, False), (1, True), (3, False)):
        tensors = {"queries": torch.rand(depth, tokens, dim)}
        features = dim * (1 + depth * tokens)
        if chosen:
            tensors["indices"] = torch.arange(features := 5)
        tensors["classifier.0.weight"] = torch.rand(2, features)
        heads.append(HeadCall(create_head("vqt", trunk, ("a", "b"), HeadState(tensors))))
        heads.append(
            HeadCall(
                create_head(
                    "linear", trunk, ("a", "b"),
                    HeadState({"classifier.0.weight": torch.rand(2, dim)}, {"layers": [0]}),
                )
            )
        )  # fmt: skip
    pixels = golden["pixel_values"][:1].repeat(4, 1, 1, 1)
    check(trunk, pixels, [heads[:2], heads[2:4], heads, heads[4:]])


def test_adapters_do_not_wait() -> None:
    model, golden, _ = fixture("dino")
    trunk, name = model.trunk, "blocks.0.mlp.fc1"
    layer = trunk.adapters.layers[name]
    sizes = layer.in_features, layer.out_features
    adapters = [
        Adapter({name: (torch.rand(rank, sizes[0]), torch.rand(sizes[1], rank))}, "")
        for rank in (1, 2)
    ]
    heads = [Embed(trunk) for _ in range(3)]
    for head, adapter in zip(heads, adapters, strict=False):  # the last one has none
        head.adapt(adapter)
    pixels = golden["pixel_values"][:1].repeat(3, 1, 1, 1)
    check(trunk, pixels, [[HeadCall(head)] for head in heads], *adapters)
    assert all(adapter.ran == {name} for adapter in adapters)


def test_what_waits_is_found() -> None:
    with fake_gpu(), NoWaiting():
        x = torch.empty(3, 2, device=GPU)
        with pytest.raises(AssertionError, match="waits for a copy"):
            x[[0, 1]]
        with pytest.raises(AssertionError, match="waits for a copy"):
            torch.tensor([1], device=GPU)
        with pytest.raises(AssertionError, match="waits for a copy of its index"):
            x[torch.zeros(2, dtype=torch.int64)]
        with pytest.raises(AssertionError, match="waits for a copy"):
            x.cpu()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(3, 2)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
