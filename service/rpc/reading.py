"""Reads the messages of calls: once the caller's key was checked, within the budget, and counted
before they are parsed.

gRPC receives a unary call's message before it calls the method. Here a method is called at once,
with an empty message. `handle_call` fills it when the key has been checked, so that callers without
one cannot make the server receive anything.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from service.client_turns import ClientTurns
from service.clients import client, identify, peer_address
from service.errors import (
    BadRequestError,
    PayloadTooLargeError,
    RequestTimeoutError,
    ServiceError,
    UnavailableError,
)
from service.holdings import Holdings
from service.limits import RETRY_AFTER_S, Share
from service.rpc.counting import check_message
from service.settings import Settings

# Calls that receive a message at a time. gRPC does not say how large one is until it is there.
MAX_RECEIVING = 16
# Of the messages of methods that need no key.
MAX_OPEN_BYTES = 64 * 1024
# Methods of our services without `handle_call`; those of other services have none either.
OPEN_METHODS = ("ServerLive", "ServerReady", "ServerMetadata")


class Incoming:
    """The messages of one call."""

    def __init__(
        self, reader: "MessageReader", received: AsyncIterator[bytes], message: Message
    ) -> None:
        """
        Args:
            received: the encoded messages.
            message: what a unary call's message is read into.
        """
        self._reader = reader
        self._received = received
        self._message = message
        self._share: Share | None = None
        self._unanswered: deque[int] = deque()
        self._was_answered = asyncio.Event()
        self._patience: asyncio.Timeout | None = None  # with a stream's next message

    async def receive(self, share: Share) -> None:
        """Receive a unary call's message, which the share counts.

        Raises:
            ServiceError: it did not come in time, is malformed, or over a limit.
        """
        seconds = self._reader.settings.body_timeout_s
        try:
            async with asyncio.timeout(seconds), self._reader.receiving():
                content = await anext(self._received, None)
                await self._forget()
        except TimeoutError as error:
            raise RequestTimeoutError(f"the message did not arrive within {seconds:g} s") from error
        if content is None:
            raise BadRequestError("the call has no message")
        share.add(self._reader.counted(content))
        parse(self._message, content)

    async def start_stream(self, share: Share) -> None:
        """Let `messages` count what it receives."""
        self._share = share

    async def messages(self) -> AsyncIterator[Message]:
        """A stream's messages, each counted until `answered`. Raises as `receive`.

        All that are unanswered may hold as much as one request. A message that would be more waits,
        and so does the client then, for nothing else of the stream is received.
        """
        try:
            async for message in self._messages():
                yield message
        finally:
            await self._forget()

    async def _messages(self) -> AsyncIterator[Message]:
        max_bytes = self._reader.settings.max_request_bytes
        while (content := await self._next()) is not None:
            assert self._share is not None
            size = self._reader.counted(content)
            self._share.receive(size)
            self._unanswered.append(size)
            while len(self._unanswered) > 1 and self._share.bytes > max_bytes:
                self._was_answered.clear()
                await self._was_answered.wait()
            message = type(self._message)()
            parse(message, content)
            yield message

    async def _next(self) -> bytes | None:
        """A stream's next message, None at its end. It must come in time once all others have been
        answered: until then, a client may wait for answers before it sends more."""
        try:
            async with asyncio.timeout(None) as self._patience:
                self._limit_waiting()
                return await anext(self._received, None)
        except TimeoutError as error:
            seconds = self._reader.settings.body_timeout_s
            raise RequestTimeoutError(f"no message arrived within {seconds:g} s") from error
        finally:
            self._patience = None

    async def _forget(self) -> None:
        """End gRPC's generator, which holds the last message, and is in a cycle with what holds it:
        only the garbage collector would free it, which counts objects and not bytes."""
        generator: Any = aiter(self._received)
        await generator.aclose()

    def _limit_waiting(self) -> None:
        if self._patience is None or self._patience.expired() or self._unanswered:
            return
        now = asyncio.get_running_loop().time()
        self._patience.reschedule(now + self._reader.settings.body_timeout_s)

    def answered(self) -> None:
        """Give back what the oldest of a stream's messages holds."""
        if self._share is not None:
            self._share.remove(self._unanswered.popleft())
            self._was_answered.set()
            self._limit_waiting()


# How `handle_call` begins to receive what a call sent.
begin: ContextVar[Any] = ContextVar("begin")


class MessageReader(grpc.aio.ServerInterceptor):
    """Gives methods their messages as the module says."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._receiving = ClientTurns(MAX_RECEIVING)
        # Calls without `handle_call`: counted apart, so that health is reported at any load.
        self._open_calls = Holdings(settings.max_requests_in_flight)
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def receiving(self) -> AbstractAsyncContextManager[None]:
        """Waits until the current client may receive a message; a context in which it does."""
        return self._receiving.place(client.get())

    def counted(self, content: bytes) -> int:
        """The bytes of a message that count; the envelope of the largest request does not."""
        return min(len(content), self.settings.max_request_bytes)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        method: str = details.method
        if method not in self._handlers:
            handler = await continuation(details)
            if handler is None:
                return None
            self._handlers[method] = self._wrap(method, handler)
        return self._handlers[method]

    @asynccontextmanager
    async def _open_call(self, context: Any) -> AsyncIterator[None]:
        """A context in which a method that needs no key runs."""
        caller = identify(None, peer_address(context.peer()))
        try:
            if not self._open_calls.fits(caller, 1):
                raise UnavailableError("too many calls", retry_after_s=RETRY_AFTER_S)
            self._open_calls.take(caller, 1)
            try:
                yield
            finally:
                self._open_calls.give_back(caller, 1)
        except ServiceError as error:
            await context.abort(grpc.StatusCode[error.grpc], error.detail)

    async def _sent(self, responses: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """A stream's responses. Each cancels the current call if the client does not read it in
        time: gRPC would wait for ever, and the stream would keep its place and its bytes. A unary
        call has given them back by then. gRPC itself keeps what was not read until the connection
        ends: ending the call's task does not end the call."""
        call = asyncio.current_task()
        assert call is not None
        async for response in responses:
            seconds = self.settings.body_timeout_s
            timer = asyncio.get_running_loop().call_later(seconds, call.cancel)
            try:
                yield response
            finally:  # also when the client has gone
                timer.cancel()

    def _wrap(self, path: str, handler: Any) -> Any:
        service, method = path.strip("/").split("/")
        descriptor = Default().FindServiceByName(service).FindMethodByName(method)
        message_class: type[Message] = GetMessageClass(descriptor.input_type)
        is_open = method in OPEN_METHODS or not service.startswith(("vitrail.", "inference."))
        how = {"response_serializer": handler.response_serializer}

        async def unary(requests: AsyncIterator[bytes], context: Any) -> Any:
            message = message_class()
            begin.set(Incoming(self, requests, message).receive)
            return await handler.unary_unary(message, context)

        async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            incoming = Incoming(self, requests, message_class())
            begin.set(incoming.start_stream)
            async for response in self._sent(handler.stream_stream(incoming.messages(), context)):
                yield response
                incoming.answered()

        async def open_messages(requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
            seconds = self.settings.body_timeout_s
            while (content := await _receive_open(requests, seconds)) is not None:
                message = message_class()
                parse(message, content)
                yield message

        async def open_unary(requests: AsyncIterator[bytes], context: Any) -> Any:
            async with self._open_call(context):
                message = await anext(open_messages(requests), message_class())
                return await handler.unary_unary(message, context)

        async def watch(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async with self._open_call(context):
                message = await anext(open_messages(requests), message_class())
                async for response in self._sent(handler.unary_stream(message, context)):
                    yield response

        async def open_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async with self._open_call(context):
                messages = open_messages(requests)
                async for response in self._sent(handler.stream_stream(messages, context)):
                    yield response

        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(open_unary if is_open else unary, **how)
        if handler.unary_stream is not None and is_open:
            return grpc.stream_stream_rpc_method_handler(watch, **how)
        assert handler.stream_stream is not None
        return grpc.stream_stream_rpc_method_handler(open_stream if is_open else stream, **how)


async def _receive_open(requests: AsyncIterator[bytes], seconds: float) -> bytes | None:
    """The next message of a method that needs no key, which is small; None at the end.

    Raises:
        RequestTimeoutError: it did not come in time.
        PayloadTooLargeError: it is not small.
    """
    try:
        async with asyncio.timeout(seconds):
            content = await anext(requests, None)
    except TimeoutError as error:
        raise RequestTimeoutError("the message did not arrive in time") from error
    if content is not None and len(content) > MAX_OPEN_BYTES:
        raise PayloadTooLargeError(f"the message has more than {MAX_OPEN_BYTES} bytes")
    return content


def parse(message: Message, content: bytes) -> None:
    """Parse an encoded message into an empty one.

    Raises:
        BadRequestError: it is malformed.
        PayloadTooLargeError: it has too many values.
    """
    check_message(message.DESCRIPTOR.full_name, content)
    try:
        message.MergeFromString(content)
    except DecodeError as error:
        raise BadRequestError("the message cannot be parsed") from error
