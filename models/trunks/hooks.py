"""Reading along while a timm ViT computes, without changing a bit of what it computes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.trunks.features import Need, Queries
from models.trunks.query_tokens import Riding, attention_map, keys_values


def readable_blocks(network: nn.Module) -> list[Any]:
    """The blocks of a plain ViT, as timm builds it; none of a network of another kind."""
    blocks: list[Any] = list(network.blocks) if isinstance(network, VisionTransformer) else []
    plain = all(
        type(block) is Block and type(block.attn) is Attention and block.attn.gate is None
        for block in blocks
    )
    return blocks if plain else []


def layered(network: nn.Module) -> list[Any]:
    """What follows one another in a network, and whose outputs heads may read: the blocks of a ViT
    or BEiT, the stages of a ConvNeXt; none of a network of another kind."""
    if isinstance(network, VisionTransformer | Beit):
        return list(network.blocks)
    return list(network.stages) if isinstance(network, ConvNeXt) else []


class Reading:
    """What one pass has yielded so far, of what it was to yield."""

    def __init__(self, blocks: list[Any], need: Need) -> None:
        self._blocks = blocks
        self._need = need
        self._riding = Riding(blocks, need.rides) if need.rides else None
        self.layers: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        self.looks: dict[int, Tensor] = {}
        self.keys_values: list[tuple[Tensor, Tensor]] = []

    def at_qkv(self, number: int, qkv_BKE: Tensor) -> None:
        if number in self._need.attention:
            self.attention[number] = attention_map(self._blocks[number], qkv_BKE)
        if number in self._need.looks:
            self.looks[number] = attention_map(self._blocks[number], qkv_BKE, 1)[:, :, 0]
        if self._need.keys_values:
            rows = list(self._need.keys_values)
            self.keys_values.append(keys_values(self._blocks[number], qkv_BKE[rows]))
        if self._riding is not None:
            self._riding.at_block(number, qkv_BKE)

    def at_output(self, number: int, x_BKD: Tensor) -> None:
        if number in self._need.layers:
            self.layers[number] = x_BKD

    def queries(self) -> dict[Queries, Tensor]:
        """What became of the queries that rode along."""
        return {} if self._riding is None else self._riding.outputs()


class BlockReader:
    """Listens at every block; several threads may run the network, each with its own reading."""

    def __init__(self, network: Any) -> None:
        self.blocks = readable_blocks(network)
        self._local = threading.local()
        for number, block in enumerate(self.blocks):
            block.attn.qkv.register_forward_hook(partial(self._on_qkv, number))
        self.layered = layered(network)
        for number, layer in enumerate(self.layered):
            layer.register_forward_hook(partial(self._on_output, number))

    @contextmanager
    def reading(self, need: Need) -> Iterator[Reading]:
        """What this thread's pass inside the block yields of what is needed."""
        self._local.reading = Reading(self.blocks, need)
        try:
            yield self._local.reading
        finally:
            self._local.reading = None

    def _on_qkv(self, number: int, module: nn.Module, given: Any, output: Tensor) -> None:
        if (reading := getattr(self._local, "reading", None)) is not None:
            reading.at_qkv(number, output)

    def _on_output(self, number: int, module: nn.Module, given: Any, output: Tensor) -> None:
        if (reading := getattr(self._local, "reading", None)) is not None:
            reading.at_output(number, output)
