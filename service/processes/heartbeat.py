"""Heartbeats of supervised processes.

A process writes to a pipe once a second, from its event loop, while its backend is live. One that
hangs, is stopped, or reports itself dead falls silent, and the supervisor replaces it.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.backend import Backend

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
BEAT, LOADING_BEAT = b".", b"L"
# The silence after which a process is replaced. Loading a model can hold the interpreter's lock for
# longer, so silence is tolerated longer after a beat that says so.
SILENCE_S = 7.0
LOADING_SILENCE_S = 60.0
# How often the supervisor looks.
LOOK_S = 0.5


@asynccontextmanager
async def beating(file: int | None, backend: Backend, *, loads: bool) -> AsyncIterator[None]:
    """A context in which the process beats.

    Args:
        file: the pipe; None if nobody watches.
        loads: whether this process loads models itself.
    """
    if file is None:
        yield
        return
    os.set_blocking(file, False)
    task = asyncio.create_task(_beat(file, backend, loads))
    try:
        yield
    finally:
        task.cancel()


async def _beat(file: int, backend: Backend, loads: bool) -> None:
    was_live = True
    while True:
        health = backend.health()
        if health.live:
            loading = loads and health.loading
            with contextlib.suppress(BlockingIOError):  # the supervisor is stopped itself
                try:
                    os.write(file, LOADING_BEAT if loading else BEAT)
                except BrokenPipeError:  # it is gone
                    return
        elif was_live:
            logger.error("not live, waiting to be replaced", extra={"reasons": health.reasons})
        was_live = health.live
        await asyncio.sleep(INTERVAL_S)


class Watch:
    """The supervisor's end of the pipe.

    It counts its own looks instead of reading a clock, so that a process is not replaced because
    the supervisor was stopped itself, or the clock jumped.
    """

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        self._silent_s = 0.0
        self._limit_s = float("inf")  # until the first beat: starting takes its time

    @property
    def has_beaten(self) -> bool:
        """Whether the process has ever shown itself alive."""
        return self._limit_s < float("inf")

    def close_write(self) -> None:
        """Close this process's copy of the end that the child has inherited."""
        os.close(self.write)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._read)

    async def silence(self) -> float:
        """Return once the process has been silent for too long, with the seconds."""
        while self._silent_s < self._limit_s:
            await asyncio.sleep(LOOK_S)
            self._silent_s += LOOK_S
            with contextlib.suppress(BlockingIOError):
                if beats := os.read(self._read, 65536):
                    self._silent_s = 0.0
                    loading = beats.endswith(LOADING_BEAT)
                    self._limit_s = LOADING_SILENCE_S if loading else SILENCE_S
        return self._silent_s
