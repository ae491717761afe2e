"""Registered memory, of whichever kind."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from service.errors import NotFoundError


@dataclass(slots=True, kw_only=True, eq=False)
class Region(ABC):
    """A part of some memory, as a client registered it. Its methods are called on the event loop.

    Args:
        owner: the id of an API key; empty for callers without one.
    """

    owner: str
    name: str
    byte_size: int

    @property
    @abstractmethod
    def memory(self) -> str:
        """Names the memory, and so tells whether two regions are parts of the same."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `status` says of it over REST."""

    @abstractmethod
    async def open(self) -> None:
        """Check that there is such memory, and that it has as many bytes.

        Raises:
            InvalidInputError: there is none, or it is too small.
        """

    @abstractmethod
    async def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, which are inside the region.

        Raises:
            ServiceError: the memory is not there any more, or shorter.
        """

    @abstractmethod
    async def write(self, offset: int, content: bytes) -> None:
        """Write bytes that are inside the region. Raises as `read`."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the memory, once nothing reads or writes it any more."""


def unknown(name: str) -> NotFoundError:
    """No region has that name."""
    return NotFoundError(f"no shared memory region {name!r} is registered", field="name")
