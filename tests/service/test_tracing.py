"""Traces of a gateway and a worker, each a process, as a real OTLP collector gets them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service import tracing
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import answers, free_port, wait_until

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


class Collector(collector_grpc.TraceServiceServicer):
    """Keeps the spans that it receives, by service."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []

    def Export(self, request: Any, context: Any) -> collector_pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]
        return collector_pb.ExportTraceServiceResponse()

    def of(self, trace: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in self.spans if span.trace_id.hex() == trace]

    def wait(self, trace: str, *names: str) -> dict[str, Span]:
        """The spans of a trace by name, once it has all of these names."""
        wait_until(lambda: set(names) <= {span.name for _, span in self.of(trace)})
        return {span.name: span for _, span in self.of(trace)}


@dataclass
class Traced:
    collector: Collector
    url: str
    rpc: str
    worker_metrics: str
    logs: Path


@pytest.fixture(scope="module")
def traced(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """A gateway and a worker that send their spans to a collector here."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    collector_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    folder = tmp_path_factory.mktemp("traced")
    environment = {
        **os.environ,
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "VITRAIL_CATALOG": str(tiny_catalog),
        "VITRAIL_DEVICE": "cpu",
        "VITRAIL_LOG_LEVEL": "debug",
        "VITRAIL_SLOW_REQUEST_S": "1e-6",
    }
    http, rpc, worker, metrics = (free_port() for _ in range(4))
    ports = ["--port", str(worker), "--metrics-port", str(metrics)]
    front = ["--workers", f"127.0.0.1:{worker}", "--port", str(http), "--grpc-port", str(rpc)]
    commands = {"worker": ["worker", *ports], "gateway": ["gateway", *front]}
    started = []
    for name, arguments in commands.items():
        with (folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "service.cli", *arguments]
            started.append(subprocess.Popen(command, env=environment, stderr=log))
    try:
        url = f"http://127.0.0.1:{http}"
        wait_until(lambda: answers(f"{url}/readyz"), 120)
        yield Traced(collector, url, f"127.0.0.1:{rpc}", f"http://127.0.0.1:{metrics}", folder)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        server.stop(None)


STAGES = ("decode", "queue", "compute", "postprocess")


def test_a_request_is_one_trace_from_its_caller_to_the_worker(
    traced: Traced, jpegs: dict[str, bytes]
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-ID": "traced-1"}
    response = httpx.post(f"{traced.url}/classify", content=jpegs["coffee"], headers=headers)
    assert response.status_code == 200
    names = ("POST /classify", "Predict", "gRPC Predict", *STAGES)
    spans = traced.collector.wait(TRACE, *names)
    services = {span.name: service for service, span in traced.collector.of(TRACE)}
    assert services["POST /classify"] == services["Predict"] == "vitrail-gateway"
    assert {services[name] for name in ("gRPC Predict", *STAGES)} == {"vitrail-worker"}
    assert spans["POST /classify"].parent_span_id.hex() == CALLER
    assert spans["Predict"].parent_span_id == spans["POST /classify"].span_id
    assert spans["gRPC Predict"].parent_span_id == spans["Predict"].span_id
    for stage in STAGES:
        assert spans[stage].parent_span_id == spans["gRPC Predict"].span_id
        assert spans[stage].end_time_unix_nano > spans[stage].start_time_unix_nano
    attributes = {a.key: a.value for a in spans["POST /classify"].attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["http.route"].string_value == "/classify"
    assert attributes["vitrail.request_id"].string_value == "traced-1"


def test_a_batch_links_to_the_requests_it_served(traced: Traced, jpegs: dict[str, bytes]) -> None:
    sent = [f"{number:032x}" for number in range(1, 5)]

    def ask(trace: str) -> int:
        headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
        return httpx.post(
            f"{traced.url}/classify", files=[("image", jpegs["rocket"])] * 4, headers=headers
        ).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, sent)) == {200}
    requests = {
        traced.collector.wait(trace, "gRPC Predict")["gRPC Predict"].span_id: trace
        for trace in sent
    }

    def served() -> set[str]:
        batches = [span for _, span in traced.collector.spans if span.name == "batch"]
        linked = {link.span_id for batch in batches for link in batch.links}
        return {trace for span_id, trace in requests.items() if span_id in linked}

    wait_until(lambda: served() == set(sent))
    batches = {span.span_id: span for _, span in traced.collector.spans if span.name == "batch"}
    wait_until(
        lambda: all(
            sum(span.name == "compute" for _, span in traced.collector.of(trace)) == 4
            for trace in sent
        )
    )
    for trace in sent:
        for _, span in traced.collector.of(trace):
            if span.name == "compute":
                [link] = span.links
                batch = batches[link.span_id]
                assert span.parent_span_id in {found.span_id for found in batch.links}
                assert batch.trace_id != span.trace_id


def test_calls_over_grpc_are_traced(traced: Traced, jpegs: dict[str, bytes]) -> None:
    trace = "a" * 32
    with grpc.insecure_channel(traced.rpc) as channel:
        VisionStub(channel).Classify(
            pb.TaskRequest(images=[jpegs["coffee"]]),
            metadata=(("traceparent", f"00-{trace}-{CALLER}-01"),),
        )
    spans = traced.collector.wait(trace, "gRPC classify", "gRPC Predict", "compute")
    assert spans["gRPC classify"].parent_span_id.hex() == CALLER


def test_what_the_caller_does_not_sample_is_not_recorded(
    traced: Traced, jpegs: dict[str, bytes]
) -> None:
    before = "b" * 32
    for trace, flags in ((before, "00"), ("c" * 32, "01")):
        headers = {"traceparent": f"00-{trace}-{CALLER}-{flags}"}
        httpx.post(f"{traced.url}/classify", content=jpegs["coffee"], headers=headers)
    traced.collector.wait("c" * 32, "POST /classify", "gRPC Predict", "compute")
    assert not traced.collector.of(before)


@pytest.mark.parametrize("sent", ["", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_malformed_parent_starts_a_new_trace(traced: Traced, sent: str) -> None:
    headers = {"traceparent": sent, "X-Request-ID": f"malformed {len(sent)}".replace(" ", "-")}
    assert httpx.get(f"{traced.url}/models", headers=headers).status_code == 200

    def found() -> list[Span]:
        return [
            span
            for _, span in traced.collector.spans
            for attribute in span.attributes
            if attribute.value.string_value == headers["X-Request-ID"]
        ]

    wait_until(lambda: bool(found()))
    assert not found()[0].parent_span_id


def test_gateways_probes_and_health_checks_have_no_spans(traced: Traced) -> None:
    assert httpx.get(f"{traced.url}/healthz").status_code == 200
    names = {span.name for _, span in traced.collector.spans}
    assert not [name for name in names if "ListModels" in name or "healthz" in name]


def test_both_logs_have_the_ids_of_request_and_trace(
    traced: Traced, jpegs: dict[str, bytes]
) -> None:
    trace = "d" * 32
    headers = {"traceparent": f"00-{trace}-{CALLER}-01", "X-Request-ID": "logged-1"}
    assert httpx.post(f"{traced.url}/classify", content=jpegs["coffee"], headers=headers).is_success

    def line(name: str) -> dict[str, Any]:
        for text in (traced.logs / f"{name}.log").read_text().splitlines():
            if '"vitrail.access"' in text and '"logged-1"' in text:
                found: dict[str, Any] = json.loads(text)
                return found
        return {}

    for name in ("gateway", "worker"):
        wait_until(lambda name=name: bool(line(name)))  # type: ignore[misc]
        assert line(name)["trace_id"] == trace
        assert line(name)["level"] == "warning"  # slow, by VITRAIL_SLOW_REQUEST_S


def test_histograms_have_exemplars_that_lead_to_traces(
    traced: Traced, jpegs: dict[str, bytes]
) -> None:
    httpx.post(f"{traced.url}/classify", content=jpegs["coffee"])
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    for url, name in (
        (f"{traced.url}/metrics", "vitrail_request_duration_seconds"),
        (f"{traced.worker_metrics}/metrics", "vitrail_stage_duration_seconds"),
    ):
        response = httpx.get(url, headers=accept)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        parsed: Any = text_string_to_metric_families(response.text)  # type: ignore[no-untyped-call]
        families = {family.name: family for family in parsed}
        found = [sample.exemplar for sample in families[name].samples if sample.exemplar]
        assert found
        assert all(re.fullmatch("[0-9a-f]{32}", each.labels["trace_id"]) for each in found)
    assert "openmetrics" not in httpx.get(f"{traced.url}/metrics").headers["content-type"]


def test_off_the_sdk_is_not_imported() -> None:
    program = (
        "import sys; from service.tracing import configure_tracing; configure_tracing('vitrail');"
        "import service.processes.gateway; sys.exit('opentelemetry.sdk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "it can be otlp or none"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "it can be grpc or http/protobuf",
        ),
    ],
)
def test_what_cannot_be_traced_stops_the_start(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tracing.TracingError, match=message):
        tracing.configure_tracing("vitrail")
    assert not tracing.is_on()
