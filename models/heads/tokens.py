"""The form `tokens` of the task `embed`: vectors of patches, of the last output or of blocks."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from models.errors import InputError
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest
from models.trunks.output import TrunkOutput
from models.trunks.transfers import index_tensor

TOKENS = "tokens"
GRID = "grid"
# Options that make one vector of an input, so that they do not apply to its tokens.
POOLED = ("pooling", "dimensions")


def asks_tokens(options: Mapping[str, Any]) -> bool:
    """Whether a request's options ask for tokens."""
    return options.get("output") == TOKENS


def check_tokens(trunk: Trunk, options: Mapping[str, Any]) -> None:
    """Check the options of a request that asks for tokens, or does not.

    Raises:
        InputError: the trunk has no patch tokens or no such layers, or options that exclude each
            other.
    """
    if not asks_tokens(options):
        for name in ("layers", "prefix"):
            if options.get(name):
                raise InputError(f"{name} is for output=tokens", field=name)
        return
    for name in POOLED:
        if options.get(name) is not None:
            raise InputError(f"{name} is for output=embedding, not for tokens", field=name)
    layers = options.get("layers", ())
    if len(set(layers)) < len(layers):
        raise InputError("layers names a block twice", field="layers")
    if layers and trunk.takes_gsd:
        raise InputError(f"the layers of {trunk.architecture} cannot be read", field="layers")
    trunk.token_request(layers)


def token_request(trunk: Trunk, options: Mapping[str, Any]) -> FeatureRequest:
    """What a pass must yield for a request's tokens."""
    return trunk.token_request(options.get("layers", ()))


def token_tensors(output: TrunkOutput, layers: Sequence[int], prefix: bool) -> dict[str, Tensor]:
    """`tokens` (B, T, D), or `tokens.N` for each of `layers`. If the tokens are one image's patches
    and no others, with their `grid` (B, 2): rows and columns.

    Args:
        layers: blocks, or stages of a ConvNeXt, counted from 0. Their outputs are before the final
            norm.
        prefix: keep class and register tokens, which come first.
    """
    skip = 0 if prefix else output.prefix
    if not layers:
        last = output.tokens_BTD if output.tower_tokens is None else output.tower_tokens
        tokens = _sequence(last, skip)
        grid = index_tensor(output.grid, tokens.device).expand(len(tokens), 2)
        # a clip's tokens are those of several frames
        return {TOKENS: tokens} | ({GRID: grid} if tokens.shape[1] == prod(output.grid) else {})
    return {f"{TOKENS}.{number}": _sequence(output.layers[number], skip) for number in layers}


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) scaled to unit length."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(lengths, 1e-12)
    return scaled


def _sequence(tokens: Tensor, skip: int) -> Tensor:
    """Tokens (B, T, D) without the first ones, or the cells of a map (B, D, h, w) row by row."""
    return tokens.flatten(2).transpose(1, 2) if tokens.dim() == 4 else tokens[:, skip:]
