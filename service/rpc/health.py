"""A client of grpc.health.v1."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def check_health(
    address: str,
    service: str = "",
    timeout_s: float = 2,
    credentials: grpc.ChannelCredentials | None = None,
) -> bool:
    """Whether the server at `address` (`host:port` or `unix:path`) reports SERVING.

    Args:
        service: a model's name; "" for the server itself.
        credentials: for TLS; None for none.

    Raises:
        grpc.RpcError: no answer in time, or no such service.
    """
    if credentials is None or address.startswith("unix:"):
        opened = grpc.insecure_channel(address)
    else:
        opened = grpc.secure_channel(address, credentials)
    with opened as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
