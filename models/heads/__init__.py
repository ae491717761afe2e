"""Heads turn a trunk's output into a task's answer. One file each; a new head is a new file.

A head works in two steps. `forward` runs on the device for all rows of a batch that ask for the
same thing. `finish` runs on the CPU for one image and applies that caller's other options.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from models.errors import CatalogError
from models.trunk import Trunk, TrunkOutput


class Head(Protocol):
    """What every head offers.

    `forward_options` names the options that `forward` takes, and so decides which rows may share
    a call; all others go to `finish`. `finish_is_slow` where it takes milliseconds, so that a
    server keeps it off its event loop.
    """

    task: str
    forward_options: frozenset[str]
    finish_is_slow: bool
    network: nn.Module | None

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise InputError for options this model cannot honour, before anything is computed."""

    def forward(self, output: TrunkOutput, **options: Any) -> dict[str, Tensor]:
        """Named tensors for a batch, first dimension B."""

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], **options: Any
    ) -> dict[str, np.ndarray]:
        """One image's named arrays to its answer's; `size` is the image's (width, height)."""


def create_head(
    name: str, trunk: Trunk, labels: tuple[str, ...], weights: Mapping[str, Tensor] | None
) -> Head:
    """Build a head by its catalog name.

    Raises:
        CatalogError: no such head, or the trunk lacks what it needs.
    """
    from models.heads.classify import Classify
    from models.heads.embed import Embed
    from models.heads.saliency import Saliency

    match name:
        case "classify":
            return Classify(trunk, labels)
        case "embed":
            return Embed(trunk)
        case "saliency":
            return Saliency(trunk, labels, weights)
    raise CatalogError(f"no head {name!r}; there are classify, embed, saliency")
