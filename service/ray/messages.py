"""What the gateway and the replicas send each other, as Ray pickles it."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.description import HeadDescription, ModelDescription
from service.types import Health, InferRequest


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request is from, for fair queues and logs."""

    client: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A request on its way.

    Args:
        remaining_s: seconds until the deadline. The request's own is in the sender's clock.
    """

    request: InferRequest
    remaining_s: float
    caller: Caller


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A replica as it describes itself.

    Args:
        replica: its name, unique in the cluster.
        models: those of the catalog that it may be asked for, and heads.
    """

    replica: str
    models: Sequence[ModelDescription]
    heads: Sequence[HeadDescription]
    health: Health
