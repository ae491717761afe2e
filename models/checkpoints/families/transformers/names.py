"""From transformers' names of weights to those of timm, of authors and of OpenAI."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Patterns and what they become, tried in turn; all that match are applied.
Names = Sequence[tuple[str, str]]
PARTS = re.compile(r"(.*\.attn)\.(query|q|key|k|value|v)\.(weight|bias)$")


def renamed(tensors: Mapping[str, Tensor], names: Names, joined: str = "") -> dict[str, Tensor]:
    """A state dict under other names, with queries, keys and values in one matrix.

    Args:
        joined: what follows `attn` in the name of that matrix, before `weight` and `bias`.

    Raises:
        KeyError: one of the three is missing.
    """
    patterns = [(re.compile(pattern), name) for pattern, name in names]
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for pattern, name in patterns:
            key = pattern.sub(name, key)
        if (match := PARTS.match(key)) is not None:
            whole = f"{match[1]}{joined}{match[3]}"
            parts.setdefault(whole, {})[match[2][0]] = value
        else:
            state[key] = value
    for key, three in parts.items():
        state[key] = torch.cat([three["q"], three["k"], three["v"]])
    return state
