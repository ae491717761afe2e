"""Models that are a low-rank adapter on a trunk, with or without a classifier of their own.

Such a model is stored as a head's file is: kind `lora`, tensors `lora.LAYER.A` (R, I) and
`lora.LAYER.B` (O, R) with the scale multiplied in, and the `classifier.0...` that was trained with
it, if there was one.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.peft import PeftAdapter
from models.errors import CheckpointError
from models.heads.base import Head
from models.heads.linear import CLASSIFIER
from models.heads.registry import create_head
from models.trunks.adapters import Adapter, Pair
from models.trunks.adapting import create_adapter
from models.trunks.base import Trunk

LORA = "lora"
# What such a model does: its classifier's task, or else the trunk's.
TASKS = ("classify", "embed")
PREFIX = f"{LORA}."

# transformers' names of a ViT's layers (of version 5, then before), as timm's; q, k and v are one
# layer there.
BLOCK = re.compile(r"(?:\w+\.)*?(?:encoder\.)?layers?\.(\d+)\.(.+)")
QKV = {
    f"attention.{prefix}{name}": part
    for part, names in enumerate((("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")))
    for prefix, name in zip(("", "attention."), names, strict=True)
}
LAYERS = {
    "attention.o_proj": "attn.proj",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def lora_state(adapter: PeftAdapter, trunk: Trunk) -> HeadState:
    """An adapter under the names of a trunk's layers, as a head's file stores it.

    Raises:
        CheckpointError: it is for layers that the trunk does not have.
    """
    matrices = _timm_names(adapter.matrices, trunk)
    trunk.adapters.check(matrices)
    tensors = {
        f"{PREFIX}{name}.{half}": pair[number]
        for name, pair in matrices.items()
        for number, half in enumerate("AB")
    }
    tensors |= {f"{CLASSIFIER}0.{name}": tensor for name, tensor in adapter.classifier.items()}
    return HeadState(tensors)


def lora_task(state: HeadState, trunk: Trunk) -> str:
    """What a model with this adapter does."""
    return "classify" if _has_classifier(state) or trunk.num_classes else "embed"


def create_lora(trunk: Trunk, labels: Sequence[str], state: HeadState) -> tuple[Head, Adapter]:
    """The head of an adapter's model, and the adapter.

    Raises:
        CatalogError, CheckpointError: they do not fit the trunk.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        name, _, half = key.removeprefix(PREFIX).rpartition(".")
        if key.startswith(PREFIX):
            halves.setdefault(name, {})[half] = tensor
        elif not key.startswith(CLASSIFIER):
            raise CheckpointError(f"the adapter has an unknown tensor {key[:100]}")
    if not halves or any(pair.keys() != {"A", "B"} for pair in halves.values()):
        raise CheckpointError("the adapter's matrices are not complete")
    adapter = create_adapter(trunk, {name: (pair["A"], pair["B"]) for name, pair in halves.items()})
    if not _has_classifier(state):
        return create_head(lora_task(state, trunk), trunk, labels), adapter
    own = {key: value for key, value in state.tensors.items() if key.startswith(CLASSIFIER)}
    return create_head("linear", trunk, labels, HeadState(own)), adapter


def class_count(state: HeadState, trunk: Trunk) -> int:
    """Classes of the adapter's own classifier, or else of the trunk's."""
    weight = state.tensors.get(f"{CLASSIFIER}0.weight")
    return trunk.num_classes if weight is None else len(weight)


def adapted_heads(heads: Mapping[str, Head], adapter: Adapter) -> dict[str, Head]:
    """A model's heads on an adapted trunk: those that read nothing but the trunk's own pass."""
    kept = {}
    for task, head in heads.items():
        request = head.request
        if request.features and not request.pixels and request.queries is None:
            head.adapt(adapter)
            kept[task] = head
    return kept


def _has_classifier(state: HeadState) -> bool:
    return any(key.startswith(CLASSIFIER) for key in state.tensors)


def _timm_names(matrices: Mapping[str, Pair], trunk: Trunk) -> dict[str, Pair]:
    """Matrices by timm's names, from timm's own or transformers'; an open_clip model's from those
    of its image tower."""
    named: dict[str, Pair] = {}
    parts: dict[str, dict[int, Pair]] = {}
    for name, pair in matrices.items():
        match = None if name in trunk.adapters.layers else BLOCK.fullmatch(name)
        block, layer = (f"blocks.{match[1]}", match[2]) if match else ("", "")
        if layer in QKV:
            parts.setdefault(f"{block}.attn.qkv", {})[QKV[layer]] = pair
        else:
            own = f"{block}.{LAYERS[layer]}" if layer in LAYERS else name.removeprefix("visual.")
            if own in named:
                raise CheckpointError(f"two matrices of the adapter are for {own[:100]}")
            named[own] = pair
    return named | {name: _fused(by_part) for name, by_part in parts.items()}


def _fused(by_part: Mapping[int, Pair]) -> Pair:
    """Matrices of the query, key and value layers (0, 1, 2) as those of one layer."""
    width = len(next(iter(by_part.values()))[1])
    inputs = {down_RI.shape[1] for down_RI, _ in by_part.values()}
    if len(inputs) > 1 or any(len(up_OR) != width for _, up_OR in by_part.values()):
        raise CheckpointError("the adapter's query, key and value have different sizes")
    down_RI = torch.cat([down_RI for down_RI, _ in by_part.values()])
    up_OR = down_RI.new_zeros(3 * width, len(down_RI))
    start = 0
    for part, (_, own_OR) in by_part.items():
        rank = own_OR.shape[1]
        up_OR[part * width : (part + 1) * width, start : start + rank] = own_OR
        start += rank
    return down_RI, up_OR
