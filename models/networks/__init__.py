"""Architectures as their authors' code has them, where no library builds them that way.

A module declares its networks as `NETWORKS`: classes or functions by the name that a
`Checkpoint.architecture` of the library `vitrail` has. They are found by being there.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import timm
from torch import nn

from models.checkpoints.checkpoint import Checkpoint
from models.discovery import modules_of

OWN = "vitrail"


def create_network(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint, without its weights: timm's, or one of this package's."""
    if checkpoint.library == "timm":
        network: nn.Module = timm.create_model(checkpoint.architecture, **checkpoint.arguments)
    else:
        network = create_own(checkpoint.architecture, **checkpoint.arguments)
    return network


def create_own(architecture: str, **arguments: Any) -> nn.Module:
    """A network of this package, without weights.

    Raises:
        KeyError: no module declares `architecture`.
    """
    network: nn.Module = networks()[architecture](**arguments)
    return network


@cache
def networks() -> Mapping[str, Callable[..., Any]]:
    """Everything that this package's modules declare as `NETWORKS`, by name.

    Raises:
        ValueError: two modules declare the same name.
    """
    collected: dict[str, Callable[..., Any]] = {}
    for module in modules_of(__name__):
        declared: Mapping[str, Callable[..., Any]] = getattr(module, "NETWORKS", {})
        if repeated := collected.keys() & declared.keys():
            raise ValueError(f"{module.__name__}: {', '.join(sorted(repeated))} declared twice")
        collected |= declared
    return MappingProxyType(collected)
