"""What `Model.run` passes to heads and formats, for outputs by the authors' names.

Servers never use this: it exists for tests, for comparisons with the authors' code, and for what
checkpoint formats return in addition to their heads' outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import InputError
from models.trunks.base import Trunk
from models.trunks.device_errors import is_cuda_error, is_out_of_memory
from models.trunks.features import NO_EXTRAS, BatchRequest, FeatureRequest, merge
from models.trunks.output import TrunkOutput
from models.trunks.text import TextTrunk

FormatOutputs = Callable[["ReferenceRun"], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """One pass of a model, with everything that its outputs can be computed from.

    Args:
        heads: the model's heads by task.
        output: what the trunk returned for `inputs`.
        inputs: named tensors, such as `pixel_values` (B, 3, H, W) and `noise` (B, N).
        states: weights that came in the checkpoint besides the trunk's, by name, float32.
    """

    trunk: Trunk
    heads: Mapping[str, Any]
    output: TrunkOutput
    inputs: Mapping[str, Tensor]
    states: Mapping[str, HeadState] = field(default_factory=dict)

    @property
    def network(self) -> Any:
        """The trunk's module."""
        return network_of(self.trunk)


def network_of(trunk: Trunk) -> Any:
    """A trunk's module, for reference outputs alone."""
    return trunk.network


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model that reference outputs are computed by.

    Args:
        task: the model's own task.
        text: the text trunk and the head on it, for models of two towers.
        format_request: what `format_outputs` needs of the pass.
        format_outputs: further outputs of the checkpoint's format.
    """

    trunk: Trunk
    heads: Mapping[str, Any]
    task: str
    text: tuple[Trunk, Any] | None = None
    states: Mapping[str, HeadState] = field(default_factory=dict)
    format_request: FeatureRequest = NO_EXTRAS
    format_outputs: FormatOutputs | None = None

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """(N, D) text embeddings of (N, T) token ids, not normalised.

        Raises:
            InputError: the ids do not fit the text tower.
        """
        assert self.text is not None
        trunk, head = self.text
        assert isinstance(trunk, TextTrunk)
        trunk.check_ids(token_ids)
        embedding: Tensor = head.forward(trunk.forward(token_ids))["embedding"]
        return embedding

    def format_batch_request(self, size: int) -> BatchRequest:
        """What `format_outputs` needs of a pass for a batch of that size."""
        return merge([(self.format_request, range(size))])

    def outputs(self, output: TrunkOutput, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the checkpoint's format returns for a pass."""
        if self.format_outputs is None:
            return {}
        states = {name: _in_float32(state) for name, state in self.states.items()}
        return self.format_outputs(ReferenceRun(self.trunk, self.heads, output, inputs, states))


def _in_float32(state: HeadState) -> HeadState:
    """A head's weights as the heads have theirs, whatever the file has."""
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in state.tensors.items()}
    return replace(state, tensors=tensors)


def image_outputs(parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of an image model: `tokens` (B, T, D) or `feature_map`, `embedding` (B, D) by the
    trunk's own pooling, what the heads for `embed` and the model's own task return, and what the
    checkpoint's format adds."""
    pixels = inputs["pixel_values"]
    rows = range(len(pixels))
    heads = {task: parts.heads[task] for task in ("embed", parts.task)}
    requests = [parts.format_request, *(head.request for head in heads.values())]
    output = parts.trunk.forward(pixels, merge((request, rows) for request in requests))
    kind = "tokens" if output.features.dim() == 3 else "feature_map"
    named = {kind: output.features, "embedding": parts.trunk.pool(output)}
    for head in heads.values():
        named |= head.forward(output)
    return named | parts.outputs(output, inputs)


@torch.inference_mode()
def reference_outputs(parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All named outputs for these inputs, float32 on the CPU.

    Raises:
        InputError: images of a size that the network does not take.
    """
    try:
        named = parts.heads[parts.task].reference_outputs(parts, inputs)
    except (RuntimeError, AssertionError, ValueError) as error:
        own = getattr(parts.trunk.preprocess, "input_size", None)
        pixels = inputs.get("pixel_values")
        if is_out_of_memory(error) or is_cuda_error(error):  # not the images' fault
            raise
        if pixels is None or own in (None, tuple(pixels.shape[-2:])):
            raise
        given, usual = (f"{rows} x {cols}" for rows, cols in (pixels.shape[-2:], own))
        raise InputError(
            f"{parts.trunk.architecture} does not take pixels of {given}, but of {usual}: {error}",
            field="pixel_values",
        ) from error
    return {name: tensor.float().cpu() for name, tensor in named.items()}
