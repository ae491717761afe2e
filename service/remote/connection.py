"""The connection to one worker, which is made again when its certificates have changed."""

import asyncio

from service.stubs.vision_pb2_grpc import VisionStub
from service.tls import WorkerCredentials

# How long the requests of an old connection have to finish.
OLD_GRACE_S = 60.0

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # one connection for each gateway and address, even if several gateways are in one process
    ("grpc.use_local_subchannel_pool", 1),
)


class Connection:
    """A channel to an address.

    Attributes:
        stub: the worker's methods, on the current channel.
    """

    def __init__(self, address: str, name: str, credentials: WorkerCredentials) -> None:
        """
        Args:
            name: the name that the worker's certificate must have; empty for that in the address.
        """
        self._address = address
        self._name = name
        self._credentials = credentials
        self._closing: set[asyncio.Task[None]] = set()
        self._open()

    def renew(self) -> None:
        """Connect again if the certificates have changed. Requests that are under way keep the old
        connection."""
        if self._credentials.refresh() != self._generation:
            closing = asyncio.create_task(self._channel.close(grace=OLD_GRACE_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._open()

    async def close(self, grace_s: float) -> None:
        """Wait up to `grace_s` seconds for the calls that are under way, and close."""
        await self._channel.close(grace=grace_s or None)

    def _open(self) -> None:
        self._channel = self._credentials.channel(self._address, self._name, OPTIONS)
        self._generation = self._credentials.generation
        self.stub = VisionStub(self._channel)
