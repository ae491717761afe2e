"""The connection to one worker, which is made again when its certificates have changed."""

import asyncio

from service import tracing
from service.clients import client
from service.keys import WORKER_TOKEN
from service.logs import request_id
from service.rpc.context import CLIENT_KEY, GATEWAY_KEY
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

    def __init__(
        self, address: str, name: str, credentials: WorkerCredentials, token: str | None
    ) -> None:
        """
        Args:
            name: the name that the worker's certificate must have; empty for that in the address.
            token: what tells the worker that its gateways are calling.
        """
        self._address = address
        self._name = name
        self._credentials = credentials
        self._token = token
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

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with a call: who asks, for which request."""
        metadata = (
            (GATEWAY_KEY, "1"),
            ("x-request-id", request_id.get() or "gateway"),
            (CLIENT_KEY, client.get() or "gateway"),
            *tracing.carrier().items(),
        )
        return metadata if self._token is None else (*metadata, (WORKER_TOKEN, self._token))

    async def close(self, grace_s: float) -> None:
        """Wait up to `grace_s` seconds for the calls that are under way, and close."""
        await self._channel.close(grace=grace_s or None)

    def _open(self) -> None:
        self._channel = self._credentials.channel(self._address, self._name, OPTIONS)
        self._generation = self._credentials.generation
        self.stub = VisionStub(self._channel)
