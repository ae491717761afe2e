"""ViTGAN (arXiv 2107.04589): the state dict of a generator, as `gen_ema.pt` holds it.

Spectrally normalised layers store what they were normalised from, and not the constant that scales
them; the file's own code takes whatever a fresh initialisation gives.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.errors import CheckpointError
from models.networks import OWN

NAME = "vitgan"
MAPPING_RATE = 0.01
SPECTRAL_EPS = 1e-4


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if {"lff.ffm.conv.weight", "layers.0.attn.temperature"} <= container.tensors.keys():
        return "a generator: Fourier features lff, attention with a temperature"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `heads` (6), `token_width` (8), `size` (32, of one that draws tiles), and
    `spectral_multipliers` by layer (what random matrices of the shape have on average)."""
    tensors = _Used(container.tensors)
    spectral = arguments.get("spectral_multipliers", {})
    state: dict[str, Tensor] = {}
    depth = _count(tensors, "layers.")
    assumed: dict[str, Any] = {}
    rate = float(arguments.get("lr_mlp", MAPPING_RATE))

    def linear(target: str, source: str, scale: float = 1.0, shift: float = 0.0) -> None:
        weight = tensors.take(f"{source}.weight")
        state[f"{target}.weight"] = weight * (scale / weight.shape[1] ** 0.5)
        state[f"{target}.bias"] = tensors.take(f"{source}.bias") * scale + shift

    def spectral_linear(target: str, source: str) -> None:
        weight = tensors.take(f"{source}.module.weight_bar")
        for unread in ("weight", "weight_v"):
            tensors.drop(f"{source}.module.{unread}")
        multiplier = spectral.get(source)
        if multiplier is None:
            multiplier = weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5
            assumed["spectral_multipliers"] = "those of random matrices, on average: approximate"
        sigma = _spectral_norm(weight, tensors.take(f"{source}.module.weight_u"))
        state[f"{target}.weight"] = weight * (multiplier / sigma / weight.shape[1] ** 0.5)
        state[f"{target}.bias"] = tensors.take(f"{source}.module.bias")

    def norm(target: str, source: str) -> None:
        linear(f"{target}.gamma", f"{source}.mlp_gamma")
        linear(f"{target}.beta", f"{source}.mlp_beta")

    def modulated(target: str, source: str) -> None:
        weight = tensors.take(f"{source}.weight")[0]
        state[f"{target}.weight"] = weight / weight[0].numel() ** 0.5
        linear(f"{target}.modulation", f"{source}.modulation", shift=1.0)
        if f"{source}.blur.kernel" in tensors.left:
            state[f"{target}.blur"] = tensors.take(f"{source}.blur.kernel")

    def styled(target: str, source: str) -> None:
        modulated(f"{target}.conv", f"{source}.conv")
        state[f"{target}.noise"] = tensors.take(f"{source}.noise.weight")
        state[f"{target}.bias"] = tensors.take(f"{source}.activate.bias")

    def shared(target: str, source: str) -> int:
        mapping = _count(tensors, f"{source}style.")
        for i in range(mapping):
            linear(f"{target}style.{i}", f"{source}style.{i + 1}", rate)
        for name in ("weight", "bias"):
            state[f"{target}places.conv.{name}"] = tensors.take(f"{source}lff.ffm.conv.{name}")
        return mapping

    def to_rgb(source: str) -> None:
        modulated("pixels.to_rgb.conv", f"{source}.conv")
        state["pixels.to_rgb.bias"] = tensors.take(f"{source}.bias").flatten()

    mapping = shared("", "")
    for i in range(depth):
        source, target = f"layers.{i}", f"blocks.{i}"
        norm(f"{target}.norm1", f"{source}.layernorm1")
        norm(f"{target}.norm2", f"{source}.layernorm2")
        state[f"{target}.attn.temperature"] = tensors.take(f"{source}.attn.temperature")
        spectral_linear(f"{target}.attn.to_qkv", f"{source}.attn.to_qkv")
        spectral_linear(f"{target}.attn.to_out", f"{source}.attn.to_out.0")
        spectral_linear(f"{target}.fc1", f"{source}.ff.net.0")
        spectral_linear(f"{target}.fc2", f"{source}.ff.net.3")
    norm("norm", "layernorm")
    dim = state["style.0.weight"].shape[0]
    built: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": int(arguments.get("heads", 6)),
        "hidden": state["blocks.0.fc1.weight"].shape[0],
        "mapping": mapping,
        "side": int(arguments.get("token_width", 8)),
    }
    if "cips.conv1.conv.weight" in tensors.left:
        built["tile_mapping"] = shared("pixels.", "cips.")
        built["tile_layers"] = 1 + _count(tensors, "cips.layers.")
        built["size"] = int(arguments.get("size", 32))
        styled("pixels.convs.0", "cips.conv1")
        for i in range(1, built["tile_layers"]):
            styled(f"pixels.convs.{i}", f"cips.layers.{i - 1}")
        to_rgb("cips.to_rgbs.0")
        built["tile_width"] = state["pixels.convs.0.bias"].shape[0]
    else:
        count = _count(tensors, "convs.")
        built["blur"] = len(tensors.left["convs.0.conv.blur.kernel"])
        for i in range(count):
            styled(f"pixels.convs.{i}", f"convs.{i}")
        to_rgb("to_rgb")
        built["channels"] = [state[f"pixels.convs.{i}.bias"].shape[0] for i in range(count)]
    if tensors.left:
        raise CheckpointError(f"not of ViTGAN's generator: {', '.join(sorted(tensors.left)[:5])}")
    told = {"heads": "heads", "side": "token_width", "size": "size"}
    assumed |= {
        name: built[key] for key, name in told.items() if key in built and name not in arguments
    }
    return Checkpoint(
        format=NAME,
        library=OWN,
        architecture="vitgan",
        arguments=built,
        state_dict=state,
        dropped=tuple(tensors.dropped),
        assumed=assumed,
    )


class _Used:
    """A state dict that tells what nobody has taken."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.left = dict(tensors)
        self.dropped: list[str] = []

    def take(self, key: str) -> Tensor:
        return self.left.pop(key).float()

    def drop(self, key: str) -> None:
        if self.left.pop(key, None) is not None:
            self.dropped.append(key)


def _count(tensors: _Used, prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    depth = prefix.count(".")
    return len({key.split(".")[depth] for key in tensors.left if key.startswith(prefix)})


def _spectral_norm(weight: Tensor, u: Tensor) -> float:
    """After one power iteration from the stored vector, as upstream takes it at every pass."""

    def unit(x: Tensor) -> Tensor:
        scaled: Tensor = x / (torch.linalg.vector_norm(x) + SPECTRAL_EPS)
        return scaled

    v = unit(weight.T @ u)
    u = unit(weight @ v)
    return float(torch.dot(u, weight @ v))
