"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a frozen trunk's linear layers.

A layer's output y = W x becomes y + B (A x) for the rows of a batch that request an adapter. Rows
with different adapters, and rows without one, share the pass: the matrices of each row are gathered
and applied by batched matrix products (as in Punica, arXiv 2310.18547, and S-LoRA, 2311.03285).

Shape suffixes: B rows, R rank, I inputs and O outputs of a layer, K adapters, M positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.errors import CheckpointError
from models.trunks.per_thread import PerThread
from models.trunks.transfers import index_tensor

# A layer's matrices: A (R, I), and B (O, R) with the scale multiplied in.
Pair = tuple[Tensor, Tensor]


class Adapter:
    """An adapter on its trunk's device, compared by identity.

    Args:
        pairs: the matrices by the layer's name.
        digest: of its weights.
    """

    def __init__(self, pairs: Mapping[str, Pair], digest: str) -> None:
        self.pairs = pairs
        self.digest = digest
        # The layers whose output it has changed, by name.
        self.ran: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices on the device."""
        return sum(matrix.nbytes for pair in self.pairs.values() for matrix in pair)


# Adapters, each with the rows of the batch that request it.
AdapterRows = Sequence[tuple[Adapter, Sequence[int]]]


class AdapterBatch:
    """The adapters of one pass.

    Args:
        size: rows of the batch.
    """

    def __init__(self, requests: AdapterRows, size: int) -> None:
        self._requests = requests
        self._size = size
        self._indices: dict[Any, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """A layer's output with its adapters' updates added; None if no row has one for it.

        Args:
            x, y: the layer's input (B * n, ..., I) and output (B * n, ..., O). The first dimension
                may hold n parts of each row, one after another, as a Swin's windows do.
        """
        adapters = [(each, rows) for each, rows in self._requests if name in each.pairs]
        if not adapters:
            return None
        for adapter, _ in adapters:
            adapter.ran.add(name)
        used = [(adapter.pairs[name], rows) for adapter, rows in adapters]
        parts, rest = divmod(len(x), self._size)
        if rest:
            raise RuntimeError(f"{name} does not keep the rows of a batch apart")
        if len(used) == 1 and len(used[0][1]) == self._size:
            [(down_RI, up_OR)] = [pair for pair, _ in used]
            return y + (x.to(down_RI.dtype) @ down_RI.T @ up_OR.T).to(y.dtype)
        downs_KRI, ups_KOR = _stack([pair for pair, _ in used])
        index, owner = self._places([own for _, own in used], parts, x.device)
        x_BMI = x[index].to(downs_KRI.dtype).flatten(1, -2) if x.dim() > 2 else x[index][:, None]
        low_BMR = torch.bmm(x_BMI.to(downs_KRI.dtype), downs_KRI[owner].transpose(1, 2))
        update_BMO = torch.bmm(low_BMR, ups_KOR[owner].transpose(1, 2))
        update = update_BMO.reshape(len(index), *y.shape[1:]).to(y.dtype)
        return y.index_add(0, index, update)

    def _places(
        self, rows: Sequence[Sequence[int]], parts: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The places of the parts of these rows, and which adapter each is for: the same in most
        layers, so they are sent to the device once."""
        key = tuple(tuple(own) for own in rows), parts
        if key not in self._indices:
            places = [row * parts + n for own in rows for row in own for n in range(parts)]
            owners = [number for number, own in enumerate(rows) for _ in range(len(own) * parts)]
            self._indices[key] = index_tensor(places, device), index_tensor(owners, device)
        return self._indices[key]


class AdapterHooks:
    """The hooks of one network. Threads may run it at the same time, each with its own adapters.

    Attributes:
        layers: the linear layers by name.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = {
            name: module for name, module in network.named_modules() if type(module) is nn.Linear
        }
        self._local = PerThread()
        for name, layer in self.layers.items():
            # before the hooks that read a layer's output
            layer.register_forward_hook(partial(self._on_output, name), prepend=True)

    @contextmanager
    def use(self, requests: AdapterRows, size: int) -> Iterator[None]:
        """Add these adapters' updates while this thread runs the network inside the block.

        Args:
            size: rows of the batch.
        """
        self._local.batch = AdapterBatch(requests, size) if requests else None
        try:
            yield
        finally:
            self._local.batch = None

    def check(self, pairs: Mapping[str, Pair]) -> None:
        """Check that matrices are for layers of this network.

        Raises:
            CheckpointError: no such layer, or of another size.
        """
        if unknown := [name for name in pairs if name not in self.layers]:
            some = ", ".join(list(self.layers)[:8])
            raise CheckpointError(
                f"the trunk has no linear layer {unknown[0][:100]!r}; it has {some}, ..."
            )
        for name, (down_RI, up_OR) in pairs.items():
            layer = self.layers[name]
            if (down_RI.shape[1], len(up_OR)) != (layer.in_features, layer.out_features):
                raise CheckpointError(
                    f"{name} takes {layer.in_features} and returns {layer.out_features}; the "
                    f"adapter is for {down_RI.shape[1]} and {len(up_OR)}"
                )

    def _on_output(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        batch: AdapterBatch | None = getattr(self._local, "batch", None)
        return None if batch is None else batch.add(name, inputs[0], output)


def _stack(pairs: Sequence[Pair]) -> Pair:
    """Matrices (K, R, I) and (K, O, R), with zeros for ranks below the largest one."""
    rank = max(len(down_RI) for down_RI, _ in pairs)
    downs = [pad(down_RI, (0, 0, 0, rank - len(down_RI))) for down_RI, _ in pairs]
    ups = [pad(up_OR, (0, rank - up_OR.shape[1])) for _, up_OR in pairs]
    return torch.stack(downs), torch.stack(ups)
