"""Counts each request once, with its outcome, for REST and gRPC alike."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect

from service import tracing
from service.errors import QueueFullError, ServiceError
from service.metrics import Metrics
from service.types import InferRequest, InferResult


class Account:
    """What the metrics need of one request: its models, its deadline and its result."""

    def __init__(self) -> None:
        self.models: list[str] = []
        self.result: InferResult | None = None
        self.deadline = math.inf

    def requested(self, request: InferRequest) -> None:
        """Record the models and the deadline of a request that goes to the backend."""
        self.models = list(dict.fromkeys(call.model or "" for call in request.calls))
        self.deadline = request.deadline

    def answered(self, result: InferResult) -> None:
        """Record the backend's result, and with it the models that were used."""
        self.models = [used.name for used in result.models]
        self.result = result


@contextmanager
def counted(
    metrics: Metrics, known: Callable[[str], bool], task: str, started: float
) -> Iterator[Account]:
    """Count the request that the block serves.

    Args:
        known: whether the catalog has a model of that name. Other names share one label, so that
            clients cannot create labels.
        started: in `time.monotonic` seconds.
    """
    account, outcome = Account(), "ok"
    try:
        yield account
    except ServiceError as error:
        outcome = error.outcome
        if isinstance(error, QueueFullError):
            metrics.queue_full_at = time.monotonic()
        raise
    except (ClientDisconnect, asyncio.CancelledError):
        outcome = "timeout" if time.monotonic() >= account.deadline else "cancelled"
        raise
    except Exception:
        outcome = "error"
        raise
    finally:
        label = _label(metrics, account.models, known)
        metrics.requests.labels(task, label, outcome).inc()
        elapsed = time.monotonic() - started
        duration = metrics.request_duration.labels(task, label, outcome)
        duration.observe(elapsed, tracing.exemplar(tracing.current()))
        metrics.statistics[label].add(elapsed, account.result, ok=outcome == "ok")
        if account.result is not None:
            _count_images(metrics, account.result)


def _label(metrics: Metrics, models: list[str], known: Callable[[str], bool]) -> str:
    if len(models) > 1:
        return "several"
    name = "".join(models)
    if not name:
        return "default"
    return metrics.label(name) if known(name) else "unknown"


def _count_images(metrics: Metrics, result: InferResult) -> None:
    for position, used in enumerate(result.models):
        outputs = (each.outputs[position] if each.outputs else each.error for each in result.images)
        outcomes = Counter(
            output.outcome if isinstance(output, ServiceError) else "ok" for output in outputs
        )
        for outcome, count in outcomes.items():
            metrics.images.labels(used.task, metrics.label(used.name), outcome).inc(count)
