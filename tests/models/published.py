"""Entries of the catalog `published` at full size, with references of timm and open_clip under the
authors' names for their weights.

Every test runs twice: on shapes alone, which take no memory, and nightly with random weights, where
outputs are compared with the reference's, too.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models.catalog import load_catalog
from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.formats import detect_format
from models.checkpoints.loading import build_towers, build_trunk
from models.networks import create_network
from models.trunks.devices import Placement

CATALOG = load_catalog("published")
State = dict[str, Tensor]
TRANSFORM = ("input_size", "crop_pct", "mean", "std", "interpolation")
# Of the largest value: deep networks with random weights amplify what rounding leaves.
TOLERANCE = 1e-4


@dataclass
class Building:
    """How references are built.

    Attributes:
        with_values: with random weights; without it on the meta device.
        reference: the library's network that was built last.
    """

    with_values: bool = False
    reference: Any = None


BUILDING = Building()


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param(False, id="shapes"),
        pytest.param(True, id="outputs", marks=pytest.mark.nightly),
    ],
)
def with_values(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests in both ways, where it is imported."""
    BUILDING.with_values, BUILDING.reference = request.param, None
    yield
    BUILDING.reference = None


def on_meta(create: Callable[[], Any]) -> State:
    with torch.device("meta"):
        state: State = create().state_dict()
    return state


def reference(create: Callable[[], nn.Module]) -> State:
    """The weights of a library's network, which outputs are compared with."""
    if not BUILDING.with_values:
        return on_meta(create)
    BUILDING.reference = network = create().eval()
    randomise(network)
    return network.state_dict()


def from_timm(name: str, **options: Any) -> State:
    return reference(lambda: timm.create_model(name, **options))


def randomise(network: nn.Module) -> None:
    """Random values for every weight, of sizes that keep activations in range."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1:
            scales = name.endswith((".weight", ".gamma", ".gamma_1", ".gamma_2"))
            value.normal_(float(scales), 0.1, generator=generator)
        elif "pos" in name or "token" in name:
            value.normal_(0, 0.2, generator=generator)
        elif value.dim():
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)


def read(
    entry: str,
    tensors: Mapping[str, Tensor],
    wrapper: str = "",
    path: Path = Path("/nowhere/file.pth"),
    **more: Any,
) -> Checkpoint:
    """What the catalog's entry makes of a file with these weights."""
    container = Container(path, tensors, wrapper=wrapper, **more)
    arguments = dict(CATALOG.trunks[entry].arguments)
    found, _ = detect_format(container, arguments)
    return found.convert(container, arguments)


def check(checkpoint: Checkpoint, **expected: Any) -> None:
    """Every weight has its place, and what no shape tells is as published; with values, outputs
    are the reference's."""
    with torch.device("meta"):
        network = create_network(checkpoint)
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in checkpoint.state_dict.items()} == own
    for name, value in expected.items():
        if name in TRANSFORM:
            assert getattr(checkpoint.preprocess, name) == value, name
        else:
            found = checkpoint.arguments[name]
            assert (list(found) if isinstance(found, list | tuple) else found) == value, name
    if BUILDING.with_values and BUILDING.reference is not None:
        compare(checkpoint)


@torch.inference_mode()
def compare(checkpoint: Checkpoint) -> None:
    """Compare a network's logits and embedding with those of the reference."""
    trunk = build_trunk(checkpoint, Placement())
    pixels = samples(trunk.preprocess.input_size)
    networks = trunk.network, BUILDING.reference
    features = [network.forward_features(pixels) for network in networks]
    for pre_logits in (False, True):
        pooled = [
            network.forward_head(tokens, pre_logits=pre_logits)
            for network, tokens in zip(networks, features, strict=True)
        ]
        assert_close(*pooled)


@torch.inference_mode()
def compare_towers(checkpoint: Checkpoint) -> None:
    """Compare the embeddings of both towers with open_clip's."""
    if not BUILDING.with_values:
        return
    towers, network = build_towers(checkpoint, Placement()), BUILDING.reference
    pixels = samples(towers.image.preprocess.input_size)
    assert_close(towers.image.network(pixels), network.encode_image(pixels))
    ids = torch.randint(1, 1000, (1, 77))
    ids[:, 9] = 49407  # the end of a text
    assert_close(towers.text.network(ids), network.encode_text(ids))


def samples(size: tuple[int, int]) -> Tensor:
    """Pixels (1, 3, H, W)."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_close(found: Any, expected: Any) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((found - expected).abs().max()) <= TOLERANCE * scale


IN_CONVNEXT = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight", ".grn.gamma"),
    (r"\.mlp\.grn\.bias", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def in_convnexts_names(state: Mapping[str, Tensor]) -> State:
    """A timm ConvNeXt's tensors under the authors' names."""
    named = {}
    for key, value in state.items():
        for ours, theirs in IN_CONVNEXT:
            key = re.sub(ours, theirs, key)
        named[key] = value[None, None, None] if ".grn." in key else value
    return named


def below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def meta(**shapes: tuple[int, ...]) -> State:
    """Tensors by name, with `__` for dots, that are not part of a reference."""
    device = "cpu" if BUILDING.with_values else "meta"
    return {k.replace("__", "."): torch.ones(v, device=device) for k, v in shapes.items()}
