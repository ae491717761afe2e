"""Overload: what cannot be finished in time is refused before it costs anything, and nobody takes
the service from the others. The only lane is held, so that queues stay as they are."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch

from service.remote.refusals import Refusals
from service.worker.batch_queue import BatchQueue
from service.worker.costs import BatchCosts
from tests.conftest import Running, running, wait_until
from tests.service.test_engine import Tap, hold, post

PASS_S = 0.1


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def server(tiny_catalog: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    options: dict[str, Any] = {
        "admin_keys": "boss",
        "models": "tiny,tiny-embed",
        "max_queue_size": 8,
        "max_batch_size": 1,
        "streams": 1,
    }
    with running(
        tiny_catalog, apart="apart" in request.param, api_keys="one,two,three", **options
    ) as started:
        started.client.headers["X-API-Key"] = "one"
        started.wait_ready()
        yield started


@pytest.fixture
def tap(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tap]:
    made = Tap(server.backend.trunks.runners["tiny"], monkeypatch)
    queue_of(server).costs = BatchCosts()
    yield made
    made.gate.set()
    wait_until(lambda: waiting(server) == 0 and not server.backend.batcher.in_flight())


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as made:
        yield made


def send(
    pool: ThreadPoolExecutor, server: Running, image: bytes, count: int, **headers: str
) -> list[Future[httpx.Response]]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return [pool.submit(post, server, "/classify", image, headers=names) for _ in range(count)]


def queue_of(server: Running) -> BatchQueue:
    return server.backend.batcher._scheduler.queues["tiny"]


def waiting(server: Running) -> int:
    return queue_of(server).admitted


def slow(server: Running, tap: Tap, image: bytes) -> None:
    """Have every pass take PASS_S, and let the server find out."""

    def fault(pixels: torch.Tensor) -> None:
        time.sleep(PASS_S)

    tap.fault = fault
    for _ in range(4):
        assert post(server, "/classify", image).status_code == 200


def test_what_would_be_late_is_refused_at_once_and_not_decoded(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    image = jpegs["coffee"]
    slow(server, tap, image)
    held = hold(server, tap, pool, image)
    others = send(pool, server, image, 7)
    wait_until(lambda: waiting(server) == 7)
    wait_until(lambda: len(queue_of(server)) == 7)
    names = (
        "vitrail_stage_duration_seconds_count",
        "vitrail_queue_refused_images_total",
        "vitrail_requests_total",
    )
    labels = ({"stage": "decode"}, {"reason": "late"}, {"outcome": "rejected"})

    def counted() -> list[float]:
        return [server.metric(n, **each) for n, each in zip(names, labels, strict=True)]

    decoded, late, rejected = counted()
    refused = post(server, "/classify", image, headers={"X-Timeout-Ms": "500"})
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "deadline" in refused.json()["detail"]
    assert counted() == [decoded, late + 1, rejected + 1]
    tap.gate.set()
    assert [future.result().status_code for future in [held, *others]] == [200] * 8


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A gateway apart remembers refusals as long as a test."""
    for limit in ("SHARE", "MAX_S"):
        monkeypatch.setattr(f"service.remote.refusals.{limit}", 600)
    add = Refusals.add
    used: list[Refusals] = []

    def noted(self: Refusals, *arguments: Any) -> None:
        used.append(self)
        add(self, *arguments)

    monkeypatch.setattr(Refusals, "add", noted)
    yield
    for each in used:
        each._latest.clear()


# Each with its content type; those of bodies that may name a model are refused if all models are.
ENTRANCES = {
    "/classify?model=tiny": "image/jpeg",
    "/classify": "multipart/form-data",
    "/embed": "application/json",
    "/predict": "application/json",
    "/v2/models/tiny/infer": "application/octet-stream",
    "/v2/models/tiny/versions/1/infer": "application/json",
    "/v1/embeddings": "application/json",
    "/embeddings": "application/json",
    "/tei/embed": "application/json",
    "/tei/rerank": "application/json",
    "/cohere/v2/embed": "application/json",
    "/immich/predict": "multipart/form-data",
    "/infinity/embeddings": "application/json",
    "/infinity/embeddings_image": "application/json",
    "/infinity/rerank": "application/json",
    "/pooling": "application/json",
    "/collections/photos/images": "image/jpeg",
    "/collections/photos/search": "image/jpeg",
    "/collections/stamps/search": "multipart/form-data",
}
# These may hold many images, which wait for their places while there is time.
PATIENT = {
    "/collections/photos/images": "application/json",
    "/collections/stamps/images": "multipart/form-data",
    "/collections/coins/images": "application/x-ndjson",
}


def test_what_would_be_refused_is_refused_before_its_body_is_read(
    server: Running,
    tap: Tap,
    pool: ThreadPoolExecutor,
    jpegs: dict[str, bytes],
    remembered: None,
) -> None:
    slow(server, tap, jpegs["coffee"])
    held = hold(server, tap, pool, jpegs["coffee"])
    others = send(pool, server, jpegs["coffee"], 7)
    wait_until(lambda: waiting(server) == 7)
    assert post(
        server, "/classify", jpegs["coffee"], headers={"X-Timeout-Ms": "500"}
    ).status_code == 429  # fmt: skip
    # less, since the refused one had spent some of its time when it was sent to a worker
    only_headers_suffice(server, "X-Timeout-Ms: 300\r\n", ENTRANCES)
    only_headers_suffice(server, "X-Timeout-Ms: 300\r\n", PATIENT)
    others += send(pool, server, jpegs["coffee"], 1)
    wait_until(lambda: waiting(server) == 8)
    assert post(server, "/classify", jpegs["coffee"]).status_code == 429  # now the queue is full
    only_headers_suffice(server, "", ENTRANCES)
    for path, content_type in PATIENT.items():  # let in, and then there is no such collection
        answer = only_headers(server, path, f"Content-Type: {content_type}\r\n")
        assert answer.startswith(b"HTTP/1.1 404 "), path
    for timeout_s in (0.5, None):
        with pytest.raises(grpc.RpcError) as refused:
            call_without_message(server, timeout_s)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    tap.gate.set()
    assert [future.result().status_code for future in [held, *others]] == [200] * 9


def only_headers_suffice(server: Running, headers: str, entrances: Mapping[str, str]) -> None:
    """Every entrance refuses a request whose body is never sent, and counts it."""

    def counted() -> tuple[float, float]:
        name = "vitrail_requests_total"
        of_model = server.metric(name, task="classify", model="tiny", outcome="rejected")
        return server.metric(name, outcome="rejected"), of_model

    total, of_model = counted()
    for path, content_type in entrances.items():
        answer = only_headers(server, path, f"{headers}Content-Type: {content_type}\r\n")
        assert answer.startswith(b"HTTP/1.1 429 "), path
        assert b"retry-after: " in answer.lower()
    assert counted() == (total + len(entrances), of_model + ("/classify" in entrances))


def only_headers(server: Running, path: str, headers: str, timeout_s: float = 10) -> bytes:
    """The answer to a request whose body is never sent."""
    port = httpx.URL(server.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: one\r\n{headers}"
            "Content-Length: 100000\r\n\r\n".encode()
        )
        return connection.recv(4096)


def call_without_message(server: Running, timeout_s: float | None) -> None:
    """A gRPC call whose message is never sent."""
    with grpc.insecure_channel(server.grpc) as channel:
        call: Any = channel.stream_unary("/vitrail.v1.Vision/Classify")
        never = threading.Event()

        def messages() -> Iterator[bytes]:
            never.wait(30)
            yield b""

        try:
            call(messages(), metadata=(("x-api-key", "one"),), timeout=timeout_s)
        finally:
            never.set()


def test_what_is_streamed_as_ndjson_waits_for_its_place(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    held = hold(server, tap, pool, jpegs["coffee"])
    others = send(pool, server, jpegs["coffee"], 8)
    wait_until(lambda: waiting(server) == 8)
    [patient] = send(pool, server, jpegs["coffee"], 1, Accept="application/x-ndjson")
    time.sleep(0.1)
    assert not patient.done()
    tap.gate.set()
    assert patient.result().status_code == 200
    assert [future.result().status_code for future in [held, *others]] == [200] * 9


def test_the_newest_that_can_still_make_it_go_before_the_oldest_that_cannot(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    slow(server, tap, jpegs["coffee"])
    held = hold(server, tap, pool, jpegs["coffee"])
    passes = len(tap.sizes)
    [old] = send(pool, server, jpegs["rocket"], 1, X_Timeout_Ms="1000")
    wait_until(lambda: len(queue_of(server)) == 1)
    time.sleep(1 - PASS_S / 2)  # now it cannot be computed in time any more
    new = send(pool, server, jpegs["coffee"], 3)
    wait_until(lambda: len(queue_of(server)) >= 3)
    tap.gate.set()
    assert old.result().status_code == 504
    assert [future.result().status_code for future in [held, *new]] == [200] * 4
    assert len(tap.sizes) == passes + 3  # the old one was not computed


def test_an_idle_server_tries_whatever_it_has_measured(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    queue_of(server).costs.add(1, 600.0)
    assert post(server, "/classify", jpegs["coffee"]).status_code == 200


def test_bulk_leaves_places_for_interactive_requests(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    held = hold(server, tap, pool, jpegs["coffee"])
    bulk = send(pool, server, jpegs["coffee"], 12, X_Priority="bulk")
    wait_until(lambda: sum(future.done() for future in bulk) == 6)
    assert waiting(server) == 6
    [user] = send(pool, server, jpegs["coffee"], 1)
    wait_until(lambda: waiting(server) == 7)
    tap.gate.set()
    assert held.result().status_code == user.result().status_code == 200
    assert sorted(future.result().status_code for future in bulk) == [200] * 6 + [429] * 6


def test_one_client_cannot_keep_the_others_out(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    held = hold(server, tap, pool, jpegs["coffee"])
    hog = send(pool, server, jpegs["coffee"], 20)
    wait_until(lambda: sum(future.done() for future in hog) == 12)
    passes = len(tap.sizes)
    other = send(pool, server, jpegs["coffee"], 1, X_API_Key="two")
    wait_until(lambda: len(queue_of(server)) == 9)
    assert post(server, "/classify", jpegs["coffee"]).status_code == 429
    batches: list[str] = []
    scheduler = server.backend.batcher._scheduler
    tap.fault = lambda pixels: batches.append(scheduler.running[0].entries[0].client)
    tap.gate.set()
    assert [future.result().status_code for future in [held, *other]] == [200] * 2
    assert sorted(future.result().status_code for future in hog) == [200] * 8 + [429] * 12
    assert len(tap.sizes) == passes + 9
    # the held pass, one of the client that came first, and then the other's
    assert len(set(batches[:2])) == 1
    assert batches[2] != batches[1]


def test_the_place_of_a_request_is_given_back_however_it_ends(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    held = hold(server, tap, pool, jpegs["coffee"])
    late = send(pool, server, jpegs["coffee"], 8, X_Timeout_Ms="300")
    assert {future.result().status_code for future in late} <= {429, 504}
    assert waiting(server) == 0
    assert post(server, "/classify", b"no image").status_code == 422
    assert waiting(server) == 0
    tap.gate.set()
    assert held.result().status_code == 200
    places = queue_of(server).places
    assert not places.interactive
    assert not places.bulk


def test_admins_see_what_waits_and_metrics_what_is_in_flight(
    server: Running, tap: Tap, pool: ThreadPoolExecutor, jpegs: dict[str, bytes]
) -> None:
    held = hold(server, tap, pool, jpegs["coffee"])
    others = send(pool, server, jpegs["coffee"], 3, X_API_Key="two")
    wait_until(lambda: len(queue_of(server)) == 3)
    assert server.client.get("/debug/queues").status_code == 403  # a user's key
    state = server.client.get("/debug/queues", headers={"X-API-Key": "boss"}).json()
    assert state["budget"]["requests"] == 5  # with this one
    assert state["budget"]["bytes"] >= 4 * len(jpegs["coffee"])
    if server.worker_metrics is None:
        tiny = state["queues"]["tiny"]
        assert (tiny["admitted_images"], tiny["decoded_images"]) == (3, 3)
        assert list(tiny["admitted"]["interactive"].values()) == [3]
        assert [(run["trunk"], run["images"]) for run in state["running"]] == [("tiny", 1)]
        assert state["decoding"]["waiting_inputs"] == 0
    else:
        [worker] = state["workers"].values()
        assert (worker["up"], worker["outstanding_images"]) == (True, 4)

    def in_flight() -> tuple[float, float]:
        flying = server.metric("vitrail_requests_in_flight", protocol="http")
        return flying, server.metric("vitrail_request_bytes_in_flight")

    wait_until(lambda: in_flight()[0] == 4 and in_flight()[1] > 0)
    tap.gate.set()
    assert [future.result().status_code for future in [held, *others]] == [200] * 4
    wait_until(lambda: in_flight() == (0, 0))
