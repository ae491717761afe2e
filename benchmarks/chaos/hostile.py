"""Hostile images beside the load, those of `make fuzz`."""

from tests.fuzzing.live import TOGETHER, Live


def try_images(url: str, count: int) -> int:
    """Have a server classify hostile images, some in each request.

    Returns:
        How many were tried.

    Raises:
        AssertionError: an answer that is the server's fault, or none.
    """
    live = Live(url)
    try:
        for first in range(0, count, TOGETHER):
            live.try_images(range(first, min(first + TOGETHER, count)))
    finally:
        live.close()
    return count
