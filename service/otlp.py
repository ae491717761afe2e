"""OpenTelemetry's SDK as Vitrail uses it. Imported only where traces are on (`tracing.py`).

Names are those of https://opentelemetry.io/docs/specs/semconv/.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_UNNAMED = "unknown_service"
_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpTracer:
    """Makes spans, and sends them in the background as the OTEL_ variables say."""

    def __init__(self, service: str) -> None:
        """
        Args:
            service: `service.name`, unless the environment has another one.

        Raises:
            ValueError: the environment names a protocol that there is not.
        """
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME, _UNNAMED)).startswith(_UNNAMED):
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        processor = BatchSpanProcessor(_exporter())
        requests = TracerProvider(resource=resource)  # samples as OTEL_TRACES_SAMPLER says
        # A batch is recorded if any of its requests is.
        batches = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        for provider in (requests, batches):
            provider.add_span_processor(processor)
        self._requests = requests.get_tracer("vitrail")
        self._batches = batches.get_tracer("vitrail")

    def start_request(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
    ) -> Span:
        """Open a request's span, in the caller's trace if the headers have one."""
        parent = _PROPAGATOR.extract(headers, Context())
        return self._requests.start_span(name, parent, SpanKind.SERVER, attributes)

    def end(self, span: Span, name: str, failed: bool, attributes: Mapping[str, Any]) -> None:
        """Close a request's span."""
        if name:
            span.update_name(name)
        span.set_attributes(attributes)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end()

    @contextmanager
    def call(self, name: str, parent: SpanContext, attributes: Mapping[str, str]) -> Iterator[Span]:
        """A span of a call to another process."""
        span = self._requests.start_span(name, _inside(parent), SpanKind.CLIENT, attributes)
        try:
            yield span
        except BaseException as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def carrier(self, span: Span) -> dict[str, str]:
        """`traceparent`, and `tracestate` if there is one."""
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, set_span_in_context(span, Context()))
        return headers

    def add_stage(
        self,
        name: str,
        request: SpanContext,
        started: float,
        ended: float,
        attributes: Mapping[str, Any],
        links: Sequence[Link] = (),
    ) -> None:
        """Record a stage of a request. Times are in `time.monotonic` seconds."""
        clock = _clock()
        span = self._requests.start_span(
            name, _inside(request), attributes=attributes, links=links,
            start_time=clock + _ns(started),
        )  # fmt: skip
        span.end(clock + _ns(ended))

    def add_batch(
        self,
        trunk: str,
        size: int,
        waited: Sequence[tuple[SpanContext, float]],
        started: float,
        ended: float,
    ) -> None:
        """Record a batch and the stages of its traced inputs."""
        attributes: Mapping[str, Any] = {"vitrail.trunk": trunk, "vitrail.batch_size": size}
        clock = _clock()
        requests = {request.span_id: request for request, _ in waited}
        batch = self._batches.start_span(
            "batch", Context(), attributes=attributes,
            links=[Link(request) for request in requests.values()],
            start_time=clock + _ns(started),
        )  # fmt: skip
        batch.end(clock + _ns(ended))
        link = [Link(batch.get_span_context())]
        for request, enqueued in waited:
            self.add_stage("queue", request, enqueued, started, {"vitrail.trunk": trunk})
            self.add_stage("compute", request, started, ended, attributes, link)


def _exporter() -> SpanExporter:
    """The exporter of OTEL_EXPORTER_OTLP_TRACES_PROTOCOL or OTEL_EXPORTER_OTLP_PROTOCOL."""
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next(filter(None, map(os.environ.get, variables)), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter

        return trace_exporter.OTLPSpanExporter()
    raise ValueError(f"the OTLP protocol is {protocol!r}; it can be grpc or http/protobuf")


def _inside(parent: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _clock() -> int:
    """Nanoseconds to add to `time.monotonic` for the time of day."""
    return time.time_ns() - time.monotonic_ns()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
