"""Connections and bodies in flight: what is slow is cut, what is too much is refused."""

import asyncio
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from service.errors import UnavailableError
from service.gateway.app import HEADS_READ, create_app
from service.gateway.ports import listeners
from service.gateway.protocol import MAX_HEADER_BYTES, MAX_HEADERS, MAX_PIPELINED
from service.gateway.server import DrainingServer, create_server
from service.limits import MAX_RETRY_AFTER_S, RETRY_AFTER_S, Budget
from service.metrics import Metrics
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.sampling import INTERVAL_S
from service.settings import Settings
from service.stubs import open_inference_pb2 as oip
from service.stubs import vision_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import Running, gateway, running, wait_until
from tests.service.test_engine import post

CHUNKED = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
GET = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server(tiny_catalog: Path) -> Iterator[Running]:
    with running(
        tiny_catalog,
        api_keys="key",
        header_timeout_s=0.5,
        body_timeout_s=0.5,
        max_connections=20,
        max_requests_in_flight=8,
        max_request_bytes=2**20,
        max_bytes_in_flight=2**20,
    ) as started:
        started.wait_ready()
        started.client.headers["X-API-Key"] = "key"
        yield started


# Another client's address, which is this machine's, too.
OTHER = "127.0.0.2"


def connect(server: Running, address: str = "127.0.0.1") -> socket.socket:
    url = httpx.URL(server.url)
    to = (url.host, int(url.port or 0))
    return socket.create_connection(to, timeout=20, source_address=(address, 0))


def is_closed(client: socket.socket) -> bool:
    """Read until the server has closed the connection."""
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"\r\n1\r\nx\r\n0\r\nX-Trailer: never",
        CHUNKED + b"X-API-Key: key\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: never",
        CHUNKED + b"\r\n5\r\nhal",
        CHUNKED + b"X-API-Key: key\r\n\r\n5\r\nhal",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
        GET + b"G",
    ],
    ids=["trailer", "trailer-key", "chunk", "chunk-key", "half", "begun"],
)
def test_what_never_ends_is_cut(server: Running, sent: bytes) -> None:
    with connect(server) as client:
        client.sendall(sent)
        assert is_closed(client)


def test_stray_bytes_after_an_answer_do_not_keep_a_connection(server: Running) -> None:
    with connect(server) as client:
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"\r\n")
        assert is_closed(client)


def test_trailers_without_end_are_cut_by_their_size(tiny_catalog: Path) -> None:
    with running(tiny_catalog) as server, connect(server) as client:
        client.sendall(CHUNKED + b"\r\n1\r\nx\r\n0\r\n")
        trailer = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(1000))
        wait_until(lambda: _is_reset(client, trailer))


def test_an_idle_connection_is_kept_for_the_next_request(server: Running) -> None:
    with connect(server) as client:
        for _ in range(2):
            client.sendall(GET)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(1)


def test_pipelined_requests_are_answered_whatever_they_have_together(server: Running) -> None:
    request = GET[:-2] + b"X-Long: %s\r\n\r\n" % (b"x" * (MAX_HEADER_BYTES // 10))
    with connect(server) as client:
        client.sendall(request * 30)
        received = b""
        while received.count(b"HTTP/1.1 200") < 30 and (part := client.recv(65536)):
            received += part
    assert received.count(b"HTTP/1.1 200") == 30


@pytest.mark.parametrize(
    "sent",
    [GET * (MAX_PIPELINED + 2), GET[:-2] + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n"],
    ids=["requests", "headers"],
)
def test_many_requests_or_headers_at_once_are_cut(server: Running, sent: bytes) -> None:
    with connect(server) as client:
        client.sendall(sent)
        assert is_closed(client)
    assert is_served(server)


def test_an_answer_that_is_never_read_is_cut(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # more than the kernel keeps for a client that does not read
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * MAX_PIPELINED)
        wait_until(lambda: _is_reset(client))
    wait_until(lambda: server.metric("vitrail_requests_in_flight", protocol="http") <= 1)
    assert "unhandled error" not in caplog.text  # also those that waited behind the first one


def test_answers_that_are_never_read_are_bounded_together() -> None:
    settings = Settings(max_bytes_in_flight=2**20, max_request_bytes=2**20, body_timeout_s=600)
    with gateway(settings, "127.0.0.1:1") as (url, client), ExitStack() as stack:
        address = httpx.URL(url)
        deaf = []
        for _ in range(20):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((address.host, address.port))
            one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * MAX_PIPELINED)
            deaf.append(one)
        wait_until(lambda: any(_is_reset(one) for one in deaf))
        assert client.get("/healthz").status_code == 200


def test_few_files_of_heads_are_read_at_once() -> None:
    """What is read of them is counted only when it is written."""
    settings = Settings(workers=("127.0.0.1:1",))
    metrics = Metrics(CollectorRegistry())
    app = create_app(settings, RemoteBackend(settings, RemoteMetrics(metrics.registry)), metrics)

    async def case() -> None:
        for _ in range(HEADS_READ):
            await app.state.reading_heads.acquire()
        to_app = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=to_app, base_url="http://gateway") as client:
            waiting = asyncio.create_task(client.get("/heads/a/head.safetensors"))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            app.state.reading_heads.release()
            assert (await waiting).status_code == 503  # no worker is there

    asyncio.run(case())


def _is_reset(client: socket.socket, sent: bytes = b"\r\n") -> bool:
    try:
        client.sendall(sent)
    except ConnectionError:
        return True
    return False


def test_connections_beyond_the_limit_are_refused_and_others_served(server: Running) -> None:
    clients, answers = [], []
    for _ in range(40):
        clients.append(client := connect(server))
        client.sendall(GET[:-2] + b"Content-Length: 20\r\n\r\n")
        answers.append(client.recv(12))
        for _ in range(2):  # who is refused still sends; the second time a closed socket fails
            client.sendall(b"x" * 10)
    assert set(answers) == {b"HTTP/1.1 200", b"HTTP/1.1 503"}  # none is reset
    assert is_served(server, OTHER)
    for client in clients:
        client.close()
    wait_until(lambda: is_served(server))


def is_served(server: Running, address: str = "127.0.0.1") -> bool:
    with connect(server, address) as client:
        return ask(client) == b"HTTP/1.1 200"


def ask(client: socket.socket) -> bytes:
    """The first bytes of an answer; none if the connection was closed."""
    try:
        client.sendall(GET)
        return client.recv(12)
    except ConnectionError:
        return b""


def test_requests_beyond_the_limit_get_503_and_health_is_reported(server: Running) -> None:
    head = CHUNKED + b"X-API-Key: key\r\n\r\n1\r\nx\r\n"
    clients = [connect(server) for _ in range(8)]
    for client in clients:
        client.sendall(head)
    wait_until(lambda: server.client.get("/v2").status_code == 503)
    refused = server.client.get("/v2")
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert server.client.get("/healthz").status_code == 200
    assert is_served(server, OTHER)
    # a client that a proxy names; proxies of this machine are believed
    assert server.client.get("/v2", headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 200
    for client in clients:
        assert is_closed(client)  # too slow: 408
        client.close()
    wait_until(lambda: server.client.get("/v2").status_code == 200)


def test_the_bytes_of_all_requests_are_bounded(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    with running(tiny_catalog, max_request_bytes=2**20, max_bytes_in_flight=2**20) as server:
        server.wait_ready()
        half = b"%x\r\n%s\r\n" % (600_000, bytes(600_000))

        def refused() -> bool:
            # a new connection each time: if the server reads it second, it is the one refused
            with connect(server) as client:
                client.sendall(CHUNKED + b"\r\n" + half)
                answer = server.client.post("/classify", content=bytes(600_000))
            return answer.status_code == 503 and answer.headers["Retry-After"] == "1"

        wait_until(refused)

        def accepted() -> bool:
            return server.client.post("/classify", content=jpegs["rocket"]).status_code == 200

        wait_until(accepted)


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113)."""
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def call_without_window(server: Running, path: str) -> socket.socket:
    """A connection with a gRPC call whose client lets nothing be sent to it."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        "x-api-key": "key",
    }
    block = b"".join(  # HPACK: literals that are not indexed
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    no_window = frame(4, 0, 0, struct.pack(">HI", 4, 0))
    host, _, port = server.grpc.partition(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_window + frame(1, 4, 1, block))
    return client


@pytest.mark.parametrize(
    ("path", "task", "message"),
    [
        ("/vitrail.v1.Vision/EmbedStream", "embed", pb.TaskRequest(images=[b"none"])),
        (
            "/inference.GRPCInferenceService/ModelStreamInfer",
            "open-inference",
            oip.ModelInferRequest(model_name="none"),
        ),
    ],
)
def test_a_stream_over_grpc_that_is_never_read_gives_back_its_place(
    server: Running, path: str, task: str, message: Any
) -> None:
    request = message.SerializeToString()

    def answered() -> float:
        return server.metric("vitrail_requests_total", task=task)

    before = answered()
    with call_without_window(server, path) as client:
        client.sendall(frame(0, 0, 1, struct.pack(">xI", len(request)) + request))
        wait_until(lambda: answered() > before)
        time.sleep(2 * INTERVAL_S)  # until the requests in flight have been counted again
        wait_until(lambda: server.metric("vitrail_requests_in_flight", protocol="grpc") == 0, 10)


WATCHED = health_pb2.HealthCheckRequest()
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_is_reported_whoever_does_not_read_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        call_without_window(server, "/grpc.health.v1.Health/Watch") as deaf,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        deaf.sendall(frame(0, 1, 1, bytes(5)))  # an empty message
        stub: Any = health_pb2_grpc.HealthStub(channel)
        wait_until(lambda: stub.Check(WATCHED).status == SERVING)  # the server looks now and then
        watch = stub.Watch(WATCHED, timeout=20)
        assert next(watch).status == SERVING
        unready = replace(server.backend.health(), ready=False)
        monkeypatch.setattr(server.backend, "health", lambda: unready)
        assert next(watch).status == NOT_SERVING
        assert stub.Check(WATCHED).status == NOT_SERVING
        monkeypatch.undo()
        assert next(watch).status == SERVING


def test_the_time_to_retry_is_that_of_giving_bytes_back() -> None:
    now = 0.0
    settings = Settings(max_bytes_in_flight=1000, max_request_bytes=1000)
    budget = Budget(settings, lambda: now)

    def retry_after(size: int) -> float:
        with budget.request("http", "") as share, pytest.raises(UnavailableError) as refused:
            share.add(size)
        assert refused.value.retry_after_s is not None
        return refused.value.retry_after_s

    with budget.request("http", "") as share:
        share.add(1000)
        assert retry_after(100) == RETRY_AFTER_S  # nothing was measured yet
        now = 20.0
    with budget.request("http", "") as share:
        share.add(1000)
        assert retry_after(1000) == pytest.approx(20)
        assert retry_after(250) == pytest.approx(5)
        now = 1e6
    with budget.request("http", "") as share:
        share.add(1000)
        assert retry_after(1000) == MAX_RETRY_AFTER_S


def test_a_request_that_never_fits_is_told_so(server: Running) -> None:
    """Its copy as float32 alone is more than all requests may hold: another try is in vain."""
    pixels = bytes(2 * 3 * 300 * 300)
    tensor = {
        "name": "pixel_values",
        "datatype": "FP16",
        "shape": [1, 3, 300, 300],
        "parameters": {"binary_data_size": len(pixels)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = server.client.post("/v2/models/tiny/infer", content=head + pixels, headers=headers)
    assert (answer.status_code, "Retry-After" in answer.headers) == (413, False)


def test_bytes_are_held_until_the_thread_that_reads_them_has_ended() -> None:
    budget, began, gate = Budget(Settings()), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        gate.wait(20)

    async def request() -> None:
        with budget.request("http", "") as share:
            share.add(100)
            await share.in_thread(work)

    async def cancel() -> None:
        task = asyncio.create_task(request())
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.wait([task])
        assert (task.cancelled(), budget.requests, budget.bytes) == (True, 0, 100)
        gate.set()
        while budget.bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(cancel(), 20))


def test_what_waits_for_a_pools_thread_ends_with_its_request() -> None:
    budget, began, gate = Budget(Settings()), threading.Event(), threading.Event()
    done: list[int] = []

    def work(size: int) -> None:
        began.set()
        gate.wait(20)
        done.append(size)

    async def request(pool: ThreadPoolExecutor, size: int) -> None:
        with budget.request("http", "") as share:
            share.add(size)
            await share.in_pool(pool, work, size)

    async def cancel(pool: ThreadPoolExecutor) -> None:
        runs = asyncio.create_task(request(pool, 100))
        await asyncio.to_thread(began.wait)
        waits = asyncio.create_task(request(pool, 20))
        await asyncio.sleep(0)
        assert budget.bytes == 120
        runs.cancel()
        waits.cancel()
        await asyncio.wait([runs, waits])
        while budget.bytes > 100:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert (budget.requests, budget.bytes, done) == (0, 100, [])
        gate.set()
        while budget.bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(asyncio.wait_for(cancel(pool), 20))
    assert done == [100]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[DrainingServer]:
    """The servers that `running` makes."""
    servers: list[DrainingServer] = []

    def create(*arguments: Any) -> DrainingServer:
        servers.append(create_server(*arguments))
        return servers[-1]

    monkeypatch.setattr("tests.conftest.create_server", create)
    return servers


def test_readiness_falls_before_listening_ends(
    tiny_catalog: Path, jpegs: dict[str, bytes], made: list[DrainingServer]
) -> None:
    with running(tiny_catalog, drain_delay_s=600) as server:
        server.wait_ready()
        made[0].handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.client.get("/readyz").status_code == 503)
        assert httpx.get(f"{server.url}/healthz").status_code == 200  # a new connection
        answer = post(server, "/classify", jpegs["coffee"])
        assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
        made[0].handle_exit(signal.SIGTERM, None)


@contextmanager
def held(server: Running, body: int) -> Iterator[tuple[socket.socket, Any]]:
    """A request over HTTP whose body is not sent yet, and a stream over gRPC that goes on."""
    ends = threading.Event()

    def forever() -> Iterator[Any]:
        ends.wait()
        yield from ()

    with connect(server) as client, grpc.insecure_channel(server.grpc) as channel:
        head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % body)
        stub: Any = VisionStub(channel)
        stream = stub.EmbedStream(forever())
        wait_until(lambda: server.metric("vitrail_requests_in_flight") >= 2)
        try:
            yield client, stream
        finally:
            ends.set()


def refuses(address: str) -> bool:
    """Whether a gRPC server accepts no new connection."""
    with grpc.insecure_channel(address) as channel:
        try:
            stub: Any = GRPCInferenceServiceStub(channel)
            stub.ServerLive(oip.ServerLiveRequest(), timeout=5)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def test_http_and_grpc_drain_at_the_same_time(
    tiny_catalog: Path, jpegs: dict[str, bytes], made: list[DrainingServer]
) -> None:
    photo = jpegs["coffee"]
    with running(tiny_catalog, drain_timeout_s=20) as server:
        server.wait_ready()
        with (
            held(server, len(photo)) as (client, stream),
            grpc.insecure_channel(server.grpc) as channel,
        ):
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(WATCHED)
            assert next(watch).status == SERVING
            made[0].should_exit = True
            # It ends by itself: nothing waits for it until the time for draining is over.
            assert [answer.status for answer in watch] == [NOT_SERVING]
            wait_until(lambda: refuses(server.grpc), 10)
            client.sendall(photo)  # HTTP has drained all along
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            stream.cancel()


def test_a_second_signal_ends_the_waiting(tiny_catalog: Path, made: list[DrainingServer]) -> None:
    with running(tiny_catalog, drain_timeout_s=100, body_timeout_s=100) as server:
        server.wait_ready()
        with held(server, 10) as (client, stream):
            made[0].handle_exit(signal.SIGTERM, None)
            wait_until(lambda: refuses(server.grpc), 10)
            made[0].supervised = True  # the supervisor's next signal is of the same stop
            made[0].handle_exit(signal.SIGTERM, None)
            assert not made[0].force_exit
            made[0].supervised = False
            made[0].handle_exit(signal.SIGTERM, None)
            client.settimeout(20)
            assert is_closed(client)
            wait_until(stream.done, 20)


def test_all_addresses_of_a_host_are_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = socket.SOCK_STREAM
    one, other = (socket.AF_INET, kind, 6, "", ("127.0.0.1", 0)), ("127.0.0.2", 0)
    absent = (socket.AF_INET, kind, 6, "", ("192.0.2.1", 0))  # no machine's
    found = [one, absent, (*one[:4], other), one]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with ExitStack() as stack:
        sockets = [stack.enter_context(each) for each in listeners("name", 0)]
        assert [each.getsockname()[0] for each in sockets] == ["127.0.0.1", "127.0.0.2"]
    found[:] = [absent]
    with pytest.raises(OSError, match="address"):
        listeners("name", 0)


def test_grpc_connections_beyond_the_limit_are_closed(tiny_catalog: Path) -> None:
    with running(tiny_catalog, max_connections=2) as server, ExitStack() as stack:

        def connects(timeout_s: float) -> bool:
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel = stack.enter_context(grpc.insecure_channel(server.grpc, options))
            try:
                grpc.channel_ready_future(channel).result(timeout=timeout_s)
            except grpc.FutureTimeoutError:
                return False
            return True

        assert connects(30)
        assert connects(30)
        assert not connects(0.5)
