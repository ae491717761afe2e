"""Traces: spans of requests and of their stages, by OpenTelemetry.

Off, which is the default, OpenTelemetry's SDK is not imported, and a request costs some comparisons
with None. `OTEL_TRACES_EXPORTER=otlp` turns it on.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

    from service.otlp import OtlpTracer

EXPORTER = "OTEL_TRACES_EXPORTER"

# Set once, when the process starts.
_tracer: "OtlpTracer | None" = None
# The span that is open for the current request.
_span: ContextVar["Span | None"] = ContextVar("span", default=None)


class TracingError(Exception):
    """Traces are turned on and cannot be made."""


def configure_tracing(service: str) -> None:
    """Turn traces on if the environment says so. Called once, when the process starts.

    Args:
        service: the process's `service.name`, unless the environment has another one.

    Raises:
        TracingError: OpenTelemetry is not installed, or its settings are invalid.
    """
    global _tracer
    exporter = os.environ.get(EXPORTER, "").strip().lower() or "none"
    if exporter == "none" or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    if exporter != "otlp":
        raise TracingError(f"{EXPORTER} is {exporter!r}; it can be otlp or none")
    try:
        from service.otlp import OtlpTracer
    except ImportError as error:
        raise TracingError(
            f"{EXPORTER} is otlp, which needs: pip install 'vitrail[tracing]'"
        ) from error
    try:
        _tracer = OtlpTracer(service)
    except Exception as error:  # the SDK raises what it finds while it reads its settings
        raise TracingError(f"OpenTelemetry cannot be configured: {error}") from error


def is_on() -> bool:
    """Whether this process makes spans."""
    return _tracer is not None


def start_request(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
) -> "Span | None":
    """Open the span of a request, which is the current one from now on.

    Args:
        headers: of the request, with the caller's `traceparent` if it has one.
    """
    if _tracer is None:
        return None
    span = _tracer.start_request(name, headers, attributes)
    _span.set(span)
    return span


def end_request(
    span: "Span | None", *, name: str = "", failed: bool, attributes: Mapping[str, Any]
) -> None:
    """Close the span of a request.

    Args:
        name: a better name that is known by now.
        failed: by the server's fault.
    """
    if span is not None and _tracer is not None:
        _tracer.end(span, name, failed, attributes)


@contextmanager
def calling(name: str, attributes: Mapping[str, str]) -> Iterator[None]:
    """A context in which another process is called for the current request."""
    if _tracer is None or (parent := current()) is None:
        yield
        return
    with _tracer.call(name, parent, attributes) as span:
        token = _span.set(span)
        try:
            yield
        finally:
            _span.reset(token)


def carrier() -> dict[str, str]:
    """The headers that make another process's spans part of the current trace."""
    if _tracer is None or (span := _span.get()) is None:
        return {}
    return _tracer.carrier(span)


def current() -> "SpanContext | None":
    """The current request's span, if it is recorded."""
    if _tracer is None or (span := _span.get()) is None or not span.is_recording():
        return None
    return span.get_span_context()


def add_stage(
    name: str, request: "SpanContext | None", started: float, ended: float, trunk: str = ""
) -> None:
    """Record a stage of an input. Times are in `time.monotonic` seconds."""
    if _tracer is not None and request is not None:
        _tracer.add_stage(name, request, started, ended, {"vitrail.trunk": trunk} if trunk else {})


def add_batch(
    trunk: str,
    size: int,
    waited: "Sequence[tuple[SpanContext, float]]",
    started: float,
    ended: float,
) -> None:
    """Record a batch: a span with links to its requests, and for each traced input the stages
    `queue` and `compute`, of which the latter has a link to the batch.

    Args:
        size: with the inputs that are not traced.
        waited: for each traced input, its request's span and when it was put into the queue.
    """
    if _tracer is not None and waited:
        _tracer.add_batch(trunk, size, waited, started, ended)


def exemplar(request: "SpanContext | None") -> dict[str, str] | None:
    """The labels of an exemplar, by which a histogram's bucket leads to a trace."""
    if request is None:
        return None
    return {"trace_id": f"{request.trace_id:032x}", "span_id": f"{request.span_id:016x}"}
