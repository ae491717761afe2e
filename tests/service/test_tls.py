"""TLS for REST and gRPC, and between gateway and worker, with certificates that are renewed."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from models import Registry
from models.checkpoints.store import Store
from service.cli import app as command_line
from service.gateway.app import create_app
from service.gateway.listener import Listener
from service.metrics import Metrics
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.rpc.server import RpcServer
from service.settings import Settings
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.worker.backend import LocalBackend
from tests.conftest import free_port, gateway, serving, serving_rpc, wait_until


class Authority:
    """A CA that signs certificates for localhost, made by openssl."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl, which makes the test's certificates, is not installed")
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ca = str(folder / "ca.pem")
        self._run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                  "-days", "2", "-subj", "/CN=CA",
                  "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip

    def issue(self, name: str) -> tuple[str, str]:
        """A certificate and its key, in place of those of the same name."""
        self._run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                  "-subj", f"/CN={name}", "-keyout", "new.key", "-out", "new.csr")  # fmt: skip
        (self.folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        self._run("x509", "-req", "-in", "new.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                  "-days", "2", "-extfile", "names", "-out", "new.pem")  # fmt: skip
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        (self.folder / "new.pem").replace(paths[0])
        (self.folder / "new.key").replace(paths[1])
        return str(paths[0]), str(paths[1])

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@contextmanager
def embedded(catalog: Path, settings: Settings) -> Iterator[tuple[str, str]]:
    """One process over TLS: its URL, and its gRPC address."""
    metrics = Metrics(CollectorRegistry())
    registry = Registry.from_catalog(catalog, device="cpu", store=Store(catalog.parent / "store"))
    backend = LocalBackend(registry, settings.worker_options, metrics)
    address = f"localhost:{free_port()}"
    rpc = RpcServer(backend, settings, metrics).serving(address)
    with serving(create_app(settings, backend, metrics, rpc), settings) as (url, _):
        yield url.replace("http://", "https://"), address


def client(url: str, authority: Authority, *certificate: str) -> httpx.Client:
    context = ssl.create_default_context(cafile=authority.ca)
    if certificate:
        context.load_cert_chain(*certificate)
    return httpx.Client(base_url=url, verify=context)


def serial(url: str) -> str:
    host, port = url.removeprefix("https://").split(":")
    return ssl.get_server_certificate((host, int(port)))


def test_rest_and_grpc_speak_tls_and_renew_their_certificate(
    tiny_catalog: Path, authority: Authority, jpegs: dict[str, bytes]
) -> None:
    cert, key = authority.issue("server")
    settings = Settings(catalog=str(tiny_catalog), device="cpu", tls_cert=cert, tls_key=key)
    roots = Path(authority.ca).read_bytes()
    ask = pb.TaskRequest(images=[jpegs["coffee"]])

    def classify(address: str) -> int:
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(roots)) as channel:
            vision: Any = VisionStub(channel)
            return len(vision.Classify(ask, timeout=60).results)

    with embedded(tiny_catalog, settings) as (url, address):
        with client(url, authority) as session:
            wait_until(lambda: session.get("/readyz").status_code == 200)
            assert session.post("/classify", content=jpegs["coffee"]).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https://", "http://"))
        assert classify(address) == 1
        with grpc.insecure_channel(address) as channel:
            plain: Any = VisionStub(channel)
            with pytest.raises(grpc.RpcError):
                plain.Classify(ask, timeout=2)

        before = serial(url)
        assert serial(url) == before
        authority.issue("server")
        assert serial(url) != before
        assert classify(address) == 1
        renewed = serial(url)
        Path(cert).write_text("half of it")
        assert serial(url) == renewed
        assert classify(address) == 1


def test_clients_need_a_certificate_where_a_ca_is_set(
    tiny_catalog: Path, authority: Authority
) -> None:
    cert, key = authority.issue("server")
    settings = Settings(
        catalog=str(tiny_catalog), device="cpu", tls_cert=cert, tls_key=key,
        tls_client_ca=authority.ca,
    )  # fmt: skip
    with embedded(tiny_catalog, settings) as (url, address):
        with client(url, authority) as stranger, pytest.raises(httpx.TransportError):
            stranger.get("/healthz")
        with client(url, authority, *authority.issue("client")) as known:
            assert known.get("/healthz").status_code == 200
        roots = Path(authority.ca).read_bytes()
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(roots)) as channel:
            vision: Any = VisionStub(channel)
            with pytest.raises(grpc.RpcError):
                vision.ListModels(pb.ListModelsRequest(), timeout=2)


def test_connections_count_before_their_handshake(authority: Authority) -> None:
    cert, key = authority.issue("server")
    settings = Settings(tls_cert=cert, tls_key=key, max_connections=4, header_timeout_s=0.5)
    with gateway(settings, "127.0.0.1:1") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=20) for _ in range(8)]
        for one in silent:
            with one:
                assert one.recv(1) == b""  # the last four at once, the others when time is up
        with client(f"https://{host}:{port}", authority) as session:

            def is_served() -> bool:
                try:
                    return session.get("/healthz").status_code == 200
                except httpx.TransportError:  # its place is not given back yet
                    return False

            wait_until(is_served)


def test_a_handshake_that_fails_otherwise_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_back = []

    class Protocol:
        def count(self, address: str) -> bool:
            return True

        def give_back(self) -> None:
            given_back.append(self)

    async def case() -> None:
        async def fail(_: Any, connection: socket.socket, **options: Any) -> None:
            connection.close()
            assert options["ssl_shutdown_timeout"] == 30
            raise ValueError("odd")

        monkeypatch.setattr(asyncio.get_running_loop(), "connect_accepted_socket", fail)
        accepting = socket.create_server(("127.0.0.1", 0))
        listener = Listener(accepting, Protocol, ssl.create_default_context(), 10, 30)
        with socket.create_connection(accepting.getsockname()):
            while not given_back:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        listener.close()

    asyncio.run(asyncio.wait_for(case(), 20))
    assert "ValueError('odd')" in caplog.text


def test_gateways_and_workers_show_each_other_certificates(
    tiny_catalog: Path, authority: Authority, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    cert, key = authority.issue("worker")
    own, own_key = authority.issue("gateway")
    worker = Settings(
        catalog=str(tiny_catalog), device="cpu", tls_cert=cert, tls_key=key,
        tls_client_ca=authority.ca,
    )  # fmt: skip
    address = f"127.0.0.1:{free_port()}"
    metrics = Metrics(CollectorRegistry())
    registry = Registry.from_catalog(
        tiny_catalog, device="cpu", store=Store(tiny_catalog.parent / "store")
    )
    backend = LocalBackend(registry, worker.worker_options, metrics)
    stranger = Authority(tmp_path / "stranger")

    @contextmanager
    def gateway(**shown: str) -> Iterator[httpx.Client]:
        settings = Settings(workers=address, **shown)  # type: ignore[arg-type]
        own_metrics = Metrics(CollectorRegistry())
        remote = RemoteBackend(settings, RemoteMetrics(own_metrics.registry))
        with serving(create_app(settings, remote, own_metrics), settings) as (_, session):
            yield session

    right = {"worker_ca": authority.ca, "worker_cert": own, "worker_key": own_key}
    with serving_rpc(backend, worker, metrics, address), gateway(**right) as session:
        wait_until(lambda: session.get("/readyz").status_code == 200)
        assert session.post("/classify", content=jpegs["coffee"]).status_code == 200
        other, other_key = stranger.issue("gateway")
        for wrong in (
            {},
            {"worker_ca": authority.ca},
            {"worker_ca": authority.ca, "worker_cert": other, "worker_key": other_key},
            {"worker_ca": stranger.ca, "worker_cert": own, "worker_key": own_key},
        ):
            with gateway(**wrong) as refused:
                answer = refused.post(
                    "/classify", content=jpegs["coffee"], headers={"X-Timeout-Ms": "1500"}
                )
                assert answer.status_code == 503
        # a renewed one is shown from the next probe on, and nothing is refused meanwhile
        authority.issue("gateway")
        for _ in range(30):
            assert session.post("/classify", content=jpegs["coffee"]).status_code == 200


def test_certificates_that_cannot_be_used_end_the_start(authority: Authority) -> None:
    cert, key = authority.issue("one")
    _, other = authority.issue("two")

    def serve(*flags: str) -> Any:
        return CliRunner().invoke(
            command_line, ["gateway", "--workers", "localhost:1", "--port", "0", *flags]
        )

    assert "neither" in serve("--tls-cert", cert).output
    assert serve("--tls-cert", cert, "--tls-key", other).exit_code == 2
    assert serve("--tls-cert", cert, "--tls-key", f"{key}.none").exit_code == 2
    assert serve("--worker-ca", f"{cert}.none").exit_code == 2
