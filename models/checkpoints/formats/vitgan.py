"""ViTGAN (arXiv 2107.04589, github.com/mlpc-ucsd/ViTGAN): a generator's state dict, `gen_ema.pt`.

Spectrally normalised layers are stored before normalisation, without the constant that scales them:
upstream takes that constant from a fresh random initialisation.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import number, whole
from models.errors import CheckpointError
from models.networks import OWN

NAME = "vitgan"
MAPPING_RATE = 0.01
SPECTRAL_EPS = 1e-4
TILES = "cips.conv1.conv.weight"
# Arguments of the network that no shape determines, and the names that arguments have for them.
ARGUMENT_NAMES = {"heads": "heads", "side": "token_width", "size": "size"}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if {"lff.ffm.conv.weight", "layers.0.attn.temperature"} <= container.tensors.keys():
        return "a generator: Fourier features lff, attention with a temperature"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """Fold all scales into the weights, so that plain layers compute the same.

    `arguments`: `heads` (6), `token_width` (8), `size` (32, of a generator of tiles), `lr_mlp`
    (0.01), and `spectral_multipliers` by layer (the average for random matrices of the shape).

    Raises:
        CheckpointError: the file holds weights that a generator does not have.
    """
    weights = _Weights(container.tensors, arguments)
    built = _convert_transformer(weights, arguments)
    if TILES in weights.source:
        built |= _convert_tiles(weights, arguments)
    else:
        built |= _convert_convolutions(weights)
    if weights.source:
        names = ", ".join(sorted(weights.source)[:5])
        raise CheckpointError(f"{container.path}: not weights of ViTGAN's generator: {names}")
    assumed: dict[str, Any] = {
        name: built[key]
        for key, name in ARGUMENT_NAMES.items()
        if key in built and name not in arguments
    }
    if weights.approximate:
        assumed["spectral_multipliers"] = "the average for random matrices (approximate)"
    return Checkpoint(
        format=NAME,
        library=OWN,
        architecture="vitgan",
        arguments=built,
        state_dict=weights.state,
        dropped=tuple(weights.dropped),
        assumed=assumed,
    )


def _convert_transformer(weights: "_Weights", arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert everything up to the last norm; returns its arguments of the network."""
    state = weights.state
    depth = weights.count("layers.")
    mapping = weights.mapping("", "")
    for i in range(depth):
        source, target = f"layers.{i}", f"blocks.{i}"
        weights.norm(f"{target}.norm1", f"{source}.layernorm1")
        weights.norm(f"{target}.norm2", f"{source}.layernorm2")
        state[f"{target}.attn.temperature"] = weights.take(f"{source}.attn.temperature")
        weights.spectral_linear(f"{target}.attn.to_qkv", f"{source}.attn.to_qkv")
        weights.spectral_linear(f"{target}.attn.to_out", f"{source}.attn.to_out.0")
        weights.spectral_linear(f"{target}.fc1", f"{source}.ff.net.0")
        weights.spectral_linear(f"{target}.fc2", f"{source}.ff.net.3")
    weights.norm("norm", "layernorm")
    return {
        "dim": state["style.0.weight"].shape[0],
        "depth": depth,
        "heads": whole("heads", arguments.get("heads", 6)),
        "hidden": state["blocks.0.fc1.weight"].shape[0],
        "mapping": mapping,
        "side": whole("token_width", arguments.get("token_width", 8)),
    }


def _convert_tiles(weights: "_Weights", arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the network that generates a tile per token (CIPS)."""
    mapping = weights.mapping("pixels.", "cips.")
    layers = 1 + weights.count("cips.layers.")
    weights.styled("pixels.convs.0", "cips.conv1")
    for i in range(1, layers):
        weights.styled(f"pixels.convs.{i}", f"cips.layers.{i - 1}")
    weights.to_rgb("cips.to_rgbs.0")
    return {
        "tile_mapping": mapping,
        "tile_layers": layers,
        "size": whole("size", arguments.get("size", 32)),
        "tile_width": weights.state["pixels.convs.0.bias"].shape[0],
    }


def _convert_convolutions(weights: "_Weights") -> dict[str, Any]:
    """Convert StyleGAN 2's convolutions."""
    count = weights.count("convs.")
    blur = len(weights.source["convs.0.conv.blur.kernel"])
    for i in range(count):
        weights.styled(f"pixels.convs.{i}", f"convs.{i}")
    weights.to_rgb("to_rgb")
    channels = [weights.state[f"pixels.convs.{i}.bias"].shape[0] for i in range(count)]
    return {"blur": blur, "channels": channels}


class _Weights:
    """The source's tensors that are not consumed yet, and the network's state dict so far.

    Every method converts one kind of layer from the name `source` to the name `target`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
        self.source = dict(tensors)
        self.state: dict[str, Tensor] = {}
        self.dropped: list[str] = []
        self.approximate = False
        self._rate = number("lr_mlp", arguments.get("lr_mlp", MAPPING_RATE))
        self._multipliers = arguments.get("spectral_multipliers", {})

    def take(self, key: str) -> Tensor:
        return self.source.pop(key).float()

    def count(self, prefix: str) -> int:
        """The number of numbered modules below a prefix."""
        depth = prefix.count(".")
        return len({key.split(".")[depth] for key in self.source if key.startswith(prefix)})

    def linear(self, target: str, source: str, scale: float = 1.0, shift: float = 0.0) -> None:
        """A linear layer with an equalised learning rate; `shift` is added to its bias."""
        weight = self.take(f"{source}.weight")
        self.state[f"{target}.weight"] = weight * (scale / weight.shape[1] ** 0.5)
        self.state[f"{target}.bias"] = self.take(f"{source}.bias") * scale + shift

    def spectral_linear(self, target: str, source: str) -> None:
        """A linear layer that is divided by its spectral norm and scaled by a multiplier."""
        weight = self.take(f"{source}.module.weight_bar")
        for unused in ("weight", "weight_v"):
            if self.source.pop(f"{source}.module.{unused}", None) is not None:
                self.dropped.append(f"{source}.module.{unused}")
        multiplier = self._multipliers.get(source)
        if multiplier is None:
            multiplier = weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5
            self.approximate = True
        sigma = _spectral_norm(weight, self.take(f"{source}.module.weight_u"))
        self.state[f"{target}.weight"] = weight * (multiplier / sigma / weight.shape[1] ** 0.5)
        self.state[f"{target}.bias"] = self.take(f"{source}.module.bias")

    def norm(self, target: str, source: str) -> None:
        """A layer norm whose scale and shift are linear layers of the style."""
        self.linear(f"{target}.gamma", f"{source}.mlp_gamma")
        self.linear(f"{target}.beta", f"{source}.mlp_beta")

    def modulated(self, target: str, source: str) -> None:
        """A modulated convolution, with its blur where it has one."""
        [weight] = self.take(f"{source}.weight")
        self.state[f"{target}.weight"] = weight / weight[0].numel() ** 0.5
        self.linear(f"{target}.modulation", f"{source}.modulation", shift=1.0)
        if f"{source}.blur.kernel" in self.source:
            self.state[f"{target}.blur"] = self.take(f"{source}.blur.kernel")

    def styled(self, target: str, source: str) -> None:
        """A modulated convolution with noise and a bias."""
        self.modulated(f"{target}.conv", f"{source}.conv")
        self.state[f"{target}.noise"] = self.take(f"{source}.noise.weight")
        self.state[f"{target}.bias"] = self.take(f"{source}.activate.bias")

    def mapping(self, target: str, source: str) -> int:
        """The mapping network and the Fourier features; returns the mapping's linear layers."""
        layers = self.count(f"{source}style.")
        for i in range(layers):
            self.linear(f"{target}style.{i}", f"{source}style.{i + 1}", self._rate)
        for name in ("weight", "bias"):
            self.state[f"{target}places.conv.{name}"] = self.take(f"{source}lff.ffm.conv.{name}")
        return layers

    def to_rgb(self, source: str) -> None:
        self.modulated("pixels.to_rgb.conv", f"{source}.conv")
        self.state["pixels.to_rgb.bias"] = self.take(f"{source}.bias").flatten()


def _spectral_norm(weight: Tensor, u: Tensor) -> float:
    """The norm after one power iteration from the stored vector, as upstream computes it."""

    def unit(x: Tensor) -> Tensor:
        scaled: Tensor = x / (torch.linalg.vector_norm(x) + SPECTRAL_EPS)
        return scaled

    v = unit(weight.T @ u)
    u = unit(weight @ v)
    return float(torch.dot(u, weight @ v))
