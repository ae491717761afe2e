"""What a method of a client does: requests, and how their answers are read."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Generic, TypeVar, get_args

import httpx

from vitrail_client.protocol import VitrailError, parse, split

T = TypeVar("T", covariant=True)
# The statuses of an image that is wrong or too large.
INPUT_STATUSES = (413, 422)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One call of a method.

    Args:
        body: the arguments of httpx for some of the items; it reads files.
        read: the method's result, from the JSON of all answers in order.
        items: what is sent in batches; None for a single request without any.
        size: bytes of an item.
    """

    method: str
    path: str
    read: Callable[[list[Any]], T]
    body: Callable[[Sequence[Any]], dict[str, Any]] = lambda _: {}
    items: Sequence[Any] | None = None
    size: Callable[[Any], int] = lambda _: 0

    def batches(self, count: int) -> list[Sequence[Any]]:
        """The items of each request, at most `count`; one without items if there are none."""
        return [()] if self.items is None else split(self.items, count, self.size)

    def answer(self, batch: Sequence[Any], response: httpx.Response) -> Any:
        """The JSON of a response; None if it has no body.

        A server refuses a request whose only image is wrong. Where that image came with others, it
        fails alone.

        Raises:
            VitrailError: the request failed.
        """
        try:
            return parse(response)
        except VitrailError as error:
            alone = self.items is not None and len(batch) == 1 < len(self.items)
            if alone and error.status in INPUT_STATUSES:
                return {"results": [{"error": dict(error.problem)}]}
            raise


def describe_method(method: Callable[..., Any], make: Callable[..., Call[Any]]) -> None:
    """Give a client's method the name, documentation and parameters of the function in here."""
    update_wrapper(method, make)
    signature = inspect.signature(make)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # PEP 362
        parameters=[itself, *signature.parameters.values()],
        return_annotation=get_args(signature.return_annotation)[0],
    )
