"""Checkpoint formats: one module per published layout, found by being in this package.

A format is a module that has the members of `CheckpointFormat`, and may have two more:

    outputs(run: ReferenceRun) -> dict[str, Tensor]
        Outputs of the authors' code that neither the trunk nor a head returns, by name. Tests
        compare them with the reference; servers do not compute them.
    request(trunk: Trunk) -> FeatureRequest
        What `outputs` needs of a pass besides its last output, such as a block's attention.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, cast

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.discovery import modules_of
from models.errors import CheckpointError
from models.reference_outputs import FormatOutputs
from models.trunks.base import Trunk
from models.trunks.features import NO_EXTRAS, FeatureRequest

# Names of networks of images in transformers (ViT, BEiT, DINOv2, Swin, SegFormer, ConvNeXt, CLIP).
TRANSFORMERS = re.compile(
    r"(^|\.)(embeddings\.(patch_embeddings|patch_embedding|class_embedding)|vision_model\.encoder\.layers"
    r"|encoder\.(patch_embeddings|stages)\.\d)\b"
)


class CheckpointFormat(Protocol):
    """The members of every module in this package. `NAME` is the format's name for users."""

    NAME: str

    def matches(self, container: Container, arguments: Mapping[str, Any]) -> str | None:
        """The reason why a container is of this format, or None if it is not."""

    def convert(self, container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
        """Translate to an architecture's own names; the container is not changed.

        Args:
            arguments: what the file does not say, such as `num_heads`. A format ignores the names
                that it does not know.

        Raises:
            CheckpointError: the container is not complete, or an argument does not fit it.
        """


@cache
def checkpoint_formats() -> tuple[CheckpointFormat, ...]:
    """Every format of this package, in the order of their file names."""
    return tuple(cast("CheckpointFormat", module) for module in modules_of(__name__))


def format_outputs(name: str, trunk: Trunk) -> tuple[FormatOutputs | None, FeatureRequest]:
    """A format's `outputs`, None if it has none, and what they need of a pass of `trunk`."""
    module = next((module for module in checkpoint_formats() if name == module.NAME), None)
    request = getattr(module, "request", None)
    return getattr(module, "outputs", None), request(trunk) if request else NO_EXTRAS


def detect_format(
    container: Container, arguments: Mapping[str, Any]
) -> tuple[CheckpointFormat, str]:
    """The format that matches, and the reason.

    Raises:
        CheckpointError: no format matches, or several do.
    """
    matching = [
        (candidate, reason)
        for candidate in checkpoint_formats()
        if (reason := candidate.matches(container, arguments))
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(candidate.NAME for candidate, _ in matching)
        raise CheckpointError(f"{container.path}: several formats match: {names}")
    if any(TRANSFORMERS.search(key) for key in container.tensors):
        raise CheckpointError(
            f"{container.path}: these are transformers' names for the weights of a network that is "
            "not supported. Use the file of the authors, or that of timm or open_clip"
        )
    known = ", ".join(candidate.NAME for candidate in checkpoint_formats())
    keys = ", ".join(list(container.tensors)[:5])
    raise CheckpointError(
        f"{container.path}: no known format (known: {known}). Its keys begin with {keys}. For a "
        "timm state dict, name its architecture: architecture = '...' in the catalog, or "
        "--architecture."
    )
