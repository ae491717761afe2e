"""Limits of requests, the same for every protocol."""

import asyncio
import contextvars
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import partial
from typing import Any, Literal, TypeVar

from service.client_turns import ClientTurns
from service.errors import DeadlineExceededError, PayloadTooLargeError, UnavailableError
from service.holdings import Holdings
from service.settings import Settings

# Numbers in the answer of a request: 8 MiB as float32, up to 40 MiB as JSON.
MAX_ANSWER_VALUES = 2**21
# Longer timeouts are shortened to a day: gRPC cannot express any length.
MAX_TIMEOUT_MS = 24 * 3600 * 1000.0

# Of a refusal by the budget, before anything is known and at most.
RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
# How much of the averages is kept when a request ends.
KEPT = 0.95

Protocol = Literal["http", "grpc"]
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")

T = TypeVar("T")


def check_input_count(settings: Settings, count: int) -> None:
    """Check the number of images, clips, latent vectors or seeds of one request.

    Raises:
        PayloadTooLargeError: more than `settings.max_images`.
    """
    if count > settings.max_images:
        raise PayloadTooLargeError(
            f"{count} images in one request; the limit is {settings.max_images}"
        )


def check_answer_size(values: int) -> None:
    """Check the numbers that a request's answer would hold, before anything is computed.

    Raises:
        PayloadTooLargeError: more than `MAX_ANSWER_VALUES`.
    """
    if values > MAX_ANSWER_VALUES:
        raise PayloadTooLargeError(
            f"the answer would hold {values} numbers; the limit is {MAX_ANSWER_VALUES}. Send fewer "
            "images at a time, or ask for fewer layers"
        )


class Budget:
    """What the requests of a process may hold together, whichever entrance they come by. Clients
    have shares of it, see `Holdings`.

    Used on the event loop alone.

    Attributes:
        by_protocol: requests in flight, by the entrance they came by.
        peak_bytes: the most bytes since it was last set.
        parsing: has one place, held while a large body is parsed.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.by_protocol: Counter[Protocol] = Counter()
        self._requests = Holdings(settings.max_requests_in_flight)
        self._bytes = Holdings(max(settings.max_bytes_in_flight, settings.max_request_bytes))
        self._max_request_bytes = settings.max_request_bytes
        self.peak_bytes = 0
        self.parsing = ClientTurns(1)
        self._clock = clock
        # Moving sums over requests that have ended: their bytes, and these times their seconds.
        self._ended_bytes = self._ended_byte_seconds = 0.0

    @property
    def requests(self) -> int:
        """Requests in flight."""
        return self._requests.taken

    @property
    def bytes(self) -> int:
        """What was received for requests in flight, bodies, messages, and images fetched by URL;
        and what is made of it."""
        return self._bytes.taken

    @contextmanager
    def request(self, protocol: Protocol, client: str) -> Iterator["Share"]:
        """A request's share, given back when the block ends and no thread works for it any more.

        Raises:
            UnavailableError: too many requests are in flight.
        """
        if not self._requests.fits(client, 1):
            raise UnavailableError(
                f"{self.requests} requests are in flight, which is the limit",
                retry_after_s=RETRY_AFTER_S,
            )
        self._requests.take(client, 1)
        self.by_protocol[protocol] += 1
        try:
            with self.share(client) as share:
                yield share
        finally:
            self._requests.give_back(client, 1)
            self.by_protocol[protocol] -= 1

    @contextmanager
    def share(self, client: str) -> Iterator["Share"]:
        """Bytes that a client holds, given back when the block ends and no thread works with them
        any more."""
        share = Share(self, client, self._clock())
        try:
            yield share
        finally:
            share.let_go()

    def give_back(self, share: "Share") -> None:
        """Take back the bytes of a request that nothing holds any more."""
        held = share.bytes + share.made_bytes
        self._bytes.give_back(share.client, held)
        self._ended_bytes = KEPT * self._ended_bytes + held
        held_byte_seconds = held * (self._clock() - share.began)
        self._ended_byte_seconds = KEPT * self._ended_byte_seconds + held_byte_seconds

    def state(self) -> dict[str, Any]:
        """What is in flight and the limits, for people."""
        return {
            "requests": self.requests,
            "by_protocol": {protocol: self.by_protocol[protocol] for protocol in PROTOCOLS},
            "max_requests": self._requests.capacity,
            "bytes": self.bytes,
            "max_bytes": self._bytes.capacity,
        }

    def count(self, share: "Share", size: int) -> None:
        """Count bytes that a request holds from now on; less than 0 if it gives some back."""
        self._bytes.take(share.client, size)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def check(self, share: "Share", size: int) -> None:
        """Check whether `size` more bytes of a request can be held. Raises as `Share.add`."""
        if share.bytes + size > self._max_request_bytes:
            raise PayloadTooLargeError(
                f"the request has more than {self._max_request_bytes} bytes, which is the limit"
            )
        self.check_room(share, size)

    def check_made(self, share: "Share", size: int) -> None:
        """Check whether `size` more bytes can be made for a request. Raises as `Share.make`."""
        own = share.bytes + share.made_bytes + size
        if own > self._bytes.capacity:
            raise PayloadTooLargeError(
                f"the request takes {own} bytes with the copies that are made of it; all requests "
                f"together may hold {self._bytes.capacity}"
            )
        self.check_room(share, size)

    def check_room(self, share: "Share", size: int) -> None:
        """Check whether all requests together can hold `size` more bytes of a request.

        Raises:
            UnavailableError: they cannot. A retry may succeed after as long as it takes to give
                back so many bytes: bytes are held for a while that was measured, so a share of
                them is given back in that share of the time.
        """
        if self._bytes.fits(share.client, size):
            return
        excess = self.bytes + size - self._bytes.capacity
        held_s = self._ended_byte_seconds / self._ended_bytes if self._ended_bytes else 0.0
        part = min(1.0, excess / self.bytes) if self.bytes else 1.0
        raise UnavailableError(
            f"the requests in flight hold {self.bytes} bytes; the limit is {self._bytes.capacity}",
            retry_after_s=min(MAX_RETRY_AFTER_S, max(RETRY_AFTER_S, held_s * part)),
        )


class Share:
    """What one request holds of the budget.

    Attributes:
        deadline: of waiting for a turn, in `time.monotonic` seconds.
        while_connected: a context that ends a wait in it when the client disconnects.
    """

    def __init__(self, budget: Budget, client: str, began: float) -> None:
        """
        Args:
            began: by the budget's clock.
        """
        self.client = client
        self.deadline = math.inf
        self.while_connected: Callable[[], AbstractContextManager[None]] = nullcontext
        self.bytes = 0
        self.made_bytes = 0
        self.began = began
        self._budget = budget
        self._holders = 1  # the request, and threads that work for it

    def make(self, size: int) -> None:
        """Count bytes that are about to be made of what was received. The limit of one request's
        bytes is for what it sends, so they do not count towards it.

        Raises:
            PayloadTooLargeError: the request would have more than all requests together may.
            UnavailableError: all requests together have too many.
        """
        self._budget.check_made(self, size)
        self.made_bytes += size
        self._budget.count(self, size)

    def give_back_made(self, size: int) -> None:
        """Give back bytes that were made, before the request ends."""
        self.made_bytes -= size
        self._budget.count(self, -size)

    @asynccontextmanager
    async def parsing(self) -> AsyncIterator[None]:
        """Waits for the client's turn to parse a large body; a context in which it parses.

        Raises:
            DeadlineExceededError: the deadline passed before its turn.
        """
        wait_s = None if self.deadline == math.inf else self.deadline - time.monotonic()
        async with AsyncExitStack() as stack:
            try:
                with self.while_connected():
                    async with asyncio.timeout(wait_s):
                        await stack.enter_async_context(self._budget.parsing.place(self.client))
            except TimeoutError as error:
                raise DeadlineExceededError(
                    "the deadline passed before the body was parsed"
                ) from error
            yield

    def receive(self, size: int) -> None:
        """Count bytes of a message that has come, which may be more than one request's: its caller
        lets the stream's later ones wait.

        Raises:
            UnavailableError: all requests together have too many.
        """
        self._budget.check_room(self, size)
        self.bytes += size
        self._budget.count(self, size)

    def add(self, size: int) -> None:
        """Count bytes that were received for the request.

        Raises:
            PayloadTooLargeError: the request has too many.
            UnavailableError: all requests together have too many.
        """
        self._budget.check(self, size)
        self.bytes += size
        self._budget.count(self, size)

    def remove(self, size: int) -> None:
        """Give bytes back before the request ends."""
        self.bytes -= size
        self._budget.count(self, -size)

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of `work(*arguments)`, which runs in a thread. It goes on there when the
        request is cancelled, and what the request holds is given back only when it has ended."""
        in_context = partial(contextvars.copy_context().run, work, *arguments)
        running = asyncio.get_running_loop().run_in_executor(None, in_context)
        self._holders += 1
        running.add_done_callback(lambda _: self.let_go())
        return await asyncio.shield(running)

    async def in_pool(self, pool: Executor, work: Callable[..., T], *arguments: Any) -> T:
        """The same in a thread of `pool`. What waits for one when the request is cancelled is not
        begun."""
        loop = asyncio.get_running_loop()
        running = pool.submit(contextvars.copy_context().run, work, *arguments)
        self._holders += 1
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self.let_go))
        return await asyncio.wrap_future(running)

    def let_go(self) -> None:
        """Give everything back, once called by the request and for each thread."""
        self._holders -= 1
        if not self._holders:
            self._budget.give_back(self)
