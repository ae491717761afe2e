"""Forward hooks that capture intermediate features of a timm network, without changing them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.networks.padded_swin import PaddedSwin
from models.trunks.attention import attention_map, keys_values
from models.trunks.features import PassPlan
from models.trunks.per_thread import PerThread
from models.trunks.query_tokens import QueryPass


def plain_blocks(network: nn.Module) -> list[Any]:
    """The blocks of a plain ViT as timm builds it; empty for every other network."""
    blocks: list[Any] = list(network.blocks) if isinstance(network, VisionTransformer) else []
    plain = all(
        type(block) is Block and type(block.attn) is Attention and block.attn.gate is None
        for block in blocks
    )
    return blocks if plain else []


def layer_modules(network: nn.Module) -> list[Any]:
    """The modules whose outputs heads can read: blocks of a ViT or BEiT, stages of a ConvNeXt
    or a padded Swin; empty for every other network."""
    if isinstance(network, VisionTransformer | Beit):
        return list(network.blocks)
    if isinstance(network, PaddedSwin):
        return list(network.layers)
    return list(network.stages) if isinstance(network, ConvNeXt) else []


class Capture:
    """What one pass has captured so far.

    `tensors` has `layers.N`, `attention.N`, `cls_attention.N`, `keys.N` and `values.N` for the
    blocks N of the plan.
    """

    def __init__(self, blocks: list[Any], plan: PassPlan, query_inputs: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._plan = plan
        self._queries = (
            QueryPass(blocks, plan.query_groups, query_inputs) if plan.query_groups else None
        )
        self.tensors: dict[str, Tensor] = {}

    def at_qkv(self, number: int, qkv_BKE: Tensor) -> None:
        block = self._blocks[number]
        if number in self._plan.attention:
            self.tensors[f"attention.{number}"] = attention_map(block, qkv_BKE)
        if number in self._plan.cls_attention:
            self.tensors[f"cls_attention.{number}"] = attention_map(block, qkv_BKE, 1)[:, :, 0]
        if self._plan.keys_values:
            keys, values = keys_values(block, qkv_BKE)
            self.tensors |= {f"keys.{number}": keys, f"values.{number}": values}
        if self._queries is not None:
            self._queries.at_block(number, qkv_BKE)

    def at_output(self, number: int, x_BKD: Tensor) -> None:
        if number in self._plan.layers:
            self.tensors[f"layers.{number}"] = x_BKD

    def finish(self) -> dict[str, Tensor]:
        """All captured tensors, with `queries` (L, N, D) if the plan has query tokens."""
        queries = {} if self._queries is None else {"queries": self._queries.output()}
        return self.tensors | queries


class BlockHooks:
    """The hooks of one network. Threads may run it at the same time, each with its own capture."""

    def __init__(self, network: Any) -> None:
        self.blocks = plain_blocks(network)
        self.layers = layer_modules(network)
        self._local = PerThread()
        for number, block in enumerate(self.blocks):
            block.attn.qkv.register_forward_hook(partial(self._on_qkv, number))
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(partial(self._on_output, number))

    @contextmanager
    def capture(self, plan: PassPlan, query_inputs: Sequence[Tensor]) -> Iterator[Capture]:
        """Capture what the plan names while this thread runs the network inside the block."""
        self._local.capture = Capture(self.blocks, plan, query_inputs)
        try:
            yield self._local.capture
        finally:
            self._local.capture = None

    def _on_qkv(self, number: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if (capture := getattr(self._local, "capture", None)) is not None:
            capture.at_qkv(number, output)

    def _on_output(self, number: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if (capture := getattr(self._local, "capture", None)) is not None:
            capture.at_output(number, output)
