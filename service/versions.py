"""Requests that are sent in several parts, which one version of each model must answer."""

from collections.abc import Awaitable, Callable, Sequence

from service.errors import UnavailableError
from service.types import InferResult

ATTEMPTS = 2


async def of_one_version(
    send: Callable[[], Awaitable[Sequence[InferResult]]],
) -> Sequence[InferResult]:
    """The results of a request's parts, which are sent once more if a model changed meanwhile.

    Args:
        send: sends all parts.

    Raises:
        UnavailableError: a model changed again.
    """
    for _ in range(ATTEMPTS):
        results = await send()
        if len({_digests(result) for result in results}) == 1:
            return results
    raise UnavailableError("a model changed while it answered the request", retry_after_s=1)


def _digests(result: InferResult) -> tuple[str, ...]:
    return tuple(used.model_digest for used in result.models)
