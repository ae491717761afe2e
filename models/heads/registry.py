"""Heads turn a trunk's output into a task's answer. One file each; a new head is a new file.

A head works in two steps. `forward` runs on the device for all rows of a batch that ask for the
same thing. `finish` runs on the CPU for one image and applies that caller's other options.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError
from models.inputs.tiling import View
from models.trunks.base import Trunk
from models.trunks.features import Need

KINDS = (
    "attention-mask", "classify", "embed", "generate", "linear", "saliency", "semantic", "tokencut",
    "vqt",
)  # fmt: skip


class Head(Protocol):
    """What every head offers.

    `forward_options` names the options that `forward` takes, and so decides which rows may share
    a call; all others go to `finish`. `finish_is_slow` where it takes milliseconds, so that a
    server keeps it off its event loop. `view` where it wants images otherwise than the trunk's own
    transform has them: what `finish` gets is then merged. `needs` is what it wants of a pass beyond
    the trunk's last output. `base.py` has what is usual.
    """

    task: str
    forward_options: frozenset[str]
    finish_is_slow: bool
    view: View | None

    def needs(self, rows: Sequence[int]) -> Need:
        """What it wants of a pass in which it answers for these rows of the batch."""

    @property
    def network(self) -> Any:
        """The module with the head's own weights, or None."""

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise InputError for options this model cannot honour, before anything is computed."""

    def at_size(self, options: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
        """The options of `forward` for an image of that (width, height)."""

    def sees_image(self, options: Mapping[str, Any]) -> bool:
        """Whether `finish` wants the decoded image itself, as `image`."""

    @property
    def forward(self) -> Callable[..., dict[str, Tensor]]:
        """`forward(output, **options)`: named tensors for a batch, first dimension B."""

    @property
    def finish(self) -> Callable[..., dict[str, np.ndarray]]:
        """`finish(row, size, **options)`: one image's row of those to its answer's named arrays;
        `size` is the image's (width, height)."""


def create_head(
    name: str, trunk: Trunk, labels: tuple[str, ...], state: HeadState | None = None
) -> Head:
    """Build a head by its kind; `state` is what it has been trained to.

    Raises:
        CatalogError: no such head, or the trunk lacks what it needs.
        CheckpointError: the head's weights do not fit the trunk.
    """
    from models.heads.classify import Classify
    from models.heads.embed import Embed, pca
    from models.heads.foreground import AttentionMask, TokenCut
    from models.heads.generate import Generate
    from models.heads.linear import Linear
    from models.heads.saliency import Saliency
    from models.heads.scaled import ScaledEmbed
    from models.heads.semantic import Semantic
    from models.heads.vqt import Vqt
    from models.networks.scale_vit import ScaleVit

    if state is None and name in ("linear", "saliency", "semantic", "vqt"):
        raise CatalogError(f"the head {name} needs a file that holds its weights")
    match name, state:
        case "attention-mask", _:
            return AttentionMask(trunk, labels)
        case "tokencut", _:
            return TokenCut(trunk, labels)
        case "classify", _:
            return Classify(trunk, labels)
        case "embed", None:
            return (ScaledEmbed if isinstance(trunk.network, ScaleVit) else Embed)(trunk)
        case "embed", HeadState():
            return Embed(trunk, projection=pca(state.tensors), pooling="cls")
        case "generate", _:
            return Generate()
        case "linear", HeadState():
            return Linear(trunk, labels, state)
        case "saliency", HeadState():
            return Saliency(trunk, labels, state.tensors)
        case "semantic", HeadState():
            return Semantic(trunk, labels, state)
        case "vqt", HeadState():
            return Vqt(trunk, labels, state)
    raise CatalogError(
        f"no head {name!r}; there are classify, embed, generate, linear, saliency, semantic, vqt"
    )
