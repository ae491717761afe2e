"""What heads request of a trunk's pass beyond its last output. Nothing else is computed or kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from models.trunks.adapters import Adapter
from models.trunks.query_tokens import QuerySet


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """What one head requests of a pass. Blocks are named by index.

    Args:
        layers: blocks, or stages, whose outputs the head reads.
        attention: blocks whose attention probabilities it reads.
        cls_attention: blocks of whose attention it reads the first token's row.
        keys_values: keys and values of every block.
        queries: query tokens that attend to every block.
        pixels: the normalised input.
        dense: a CLIP's embedding of every patch.
        tokens: the tokens of a tower whose last output is its embedding.
        adapter: a low-rank adapter that the rows' pass goes through. All heads of a row request
            the same one.
        features: the last output. If no head of a batch requests it, the network is not run.
    """

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    cls_attention: frozenset[int] = frozenset()
    keys_values: bool = False
    queries: QuerySet | None = None
    pixels: bool = False
    dense: bool = False
    tokens: bool = False
    adapter: Adapter | None = None
    features: bool = True


NO_EXTRAS = FeatureRequest()


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What a pass yields, for all heads of a batch: hashable, without rows and tensors, so that an
    engine can build it once.

    Args:
        query_groups: one entry for each group of rows with equally many query tokens; true if
            the group is the whole batch in its order.
    """

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    cls_attention: frozenset[int] = frozenset()
    keys_values: bool = False
    query_groups: tuple[bool, ...] = ()
    pixels: bool = False
    dense: bool = False
    tokens: bool = False
    features: bool = True


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a batch's heads request together: a plan, and which rows request which query tokens and
    which adapter."""

    plan: PassPlan = PassPlan()
    queries: tuple[tuple[QuerySet, tuple[int, ...]], ...] = ()
    adapters: tuple[tuple[Adapter, tuple[int, ...]], ...] = ()


LAST_OUTPUT = BatchRequest()


def merge(requests: Iterable[tuple[FeatureRequest, Sequence[int]]]) -> BatchRequest:
    """Merge the requests of a batch's heads, each with the rows of the batch that it is for."""
    pairs = list(requests)
    distinct = list(dict.fromkeys(request for request, _ in pairs))
    if all(request == NO_EXTRAS for request in distinct):
        return LAST_OUTPUT
    plan = PassPlan(
        layers=frozenset(number for request in distinct for number in request.layers),
        attention=frozenset(number for request in distinct for number in request.attention),
        cls_attention=frozenset(number for request in distinct for number in request.cls_attention),
        keys_values=any(request.keys_values for request in distinct),
        pixels=any(request.pixels for request in distinct),
        dense=any(request.dense for request in distinct),
        tokens=any(request.tokens for request in distinct),
        features=any(request.features for request in distinct),
    )
    queries = tuple(
        (request.queries, tuple(rows)) for request, rows in pairs if request.queries is not None
    )
    if len({query_set for query_set, _ in queries}) < len(queries):
        raise ValueError("a head with query tokens is called twice in one pass")
    adapters = _adapters(pairs)
    if queries and adapters:  # their layers take query tokens, which belong to other heads
        raise ValueError("adapters and query tokens need passes of their own")
    return BatchRequest(plan, queries, adapters)


def _adapters(
    pairs: Sequence[tuple[FeatureRequest, Sequence[int]]],
) -> tuple[tuple[Adapter, tuple[int, ...]], ...]:
    """The adapters of a batch's heads, each with its rows."""
    by_row: dict[int, Adapter | None] = {}
    for request, rows in pairs:
        for row in rows:
            if by_row.setdefault(row, request.adapter) is not request.adapter:
                raise ValueError("the heads of a row request different adapters")
    by_adapter: dict[Adapter, list[int]] = {}
    for row, adapter in by_row.items():
        if adapter is not None:
            by_adapter.setdefault(adapter, []).append(row)
    return tuple((adapter, tuple(rows)) for adapter, rows in by_adapter.items())
