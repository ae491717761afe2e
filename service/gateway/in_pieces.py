"""A transport of TLS whose unsent bytes are all counted."""

from typing import Any

# What is written to TLS at once.
PIECE_BYTES = 64 * 1024


class InPieces:
    """A TLS transport that is written to in pieces: of what it gets at once, all is passed on to
    the transport below, and nothing counts as unsent."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=PIECE_BYTES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), PIECE_BYTES):
            self._transport.write(view[start : start + PIECE_BYTES])
