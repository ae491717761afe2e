"""What a method of a client does: requests, and how their answers are read."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Generic, TypeVar, get_args

import httpx

from vitrail_client.protocol import Entry, VitrailError, parse, split

T = TypeVar("T", covariant=True)
# The statuses of an image that is wrong or too large.
INPUT_STATUSES = (413, 422)
# The fields by which a server names an item itself; what is wrong with others is wrong with all.
ITEM_FIELDS = {"image", "images", "pixel_values", "text", "texts", "id", "metadata", "thumbnail"}


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
        """The items of each request, at most `count`. A call without items is one empty batch."""
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
            if alone and error.status in INPUT_STATUSES and _is_of_item(error.problem):
                return {"results": [{"error": dict(error.problem)}]}
            raise


def raise_if_all_failed(entries: Sequence[Entry]) -> None:
    """Fail the call if every item came alone and was refused for the same field.

    Raises:
        VitrailError: the first item's error.
    """
    problems = [entry.get("error", {}) for entry in entries]
    fields = [problem.get("errors") for problem in problems]  # only whole requests' errors have it
    if fields and fields[0] and all(each == fields[0] for each in fields):
        raise VitrailError(problems[0].get("status", 422), problems[0])


def _is_of_item(problem: Mapping[str, Any]) -> bool:
    """Whether a problem names no other field than the item's own."""
    fields = {error["field"].partition(".")[0] for error in problem.get("errors", ())}
    return fields <= ITEM_FIELDS


def describe_method(method: Callable[..., Any], make: Callable[..., Call[Any]]) -> None:
    """Give a client's method the name, documentation and parameters of the function in here."""
    update_wrapper(method, make)
    signature = inspect.signature(make)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # PEP 362
        parameters=[itself, *signature.parameters.values()],
        return_annotation=get_args(signature.return_annotation)[0],
    )
