"""A gateway and several workers: routing by model, and what becomes of requests when workers go."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from models import Registry
from models.checkpoints.store import Store
from service.errors import UnavailableError
from service.logs import request_id
from service.metrics import Metrics
from service.settings import Settings
from service.types import InferRequest, InferResult
from service.worker.backend import LocalBackend
from tests.conftest import (
    PLAIN,
    answers,
    free_port,
    gateway,
    process,
    running,
    serving_rpc,
    wait_until,
)

BLOCKER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "open_clip", "rasterio"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
"""


def spawn_worker(port: int, catalog: Path, *flags: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "service.cli", "worker", "--port", str(port)]
    command += ["--metrics-port", "0", "--catalog", str(catalog), "--device", "cpu"]
    return subprocess.Popen([*command, "--log-level", "warning", *flags])


def post(client: httpx.Client, path: str, *images: bytes, **options: Any) -> httpx.Response:
    return client.post(path, files=[("image", ("x", image)) for image in images], **options)


# Of a client between two requests while a test waits for something else.
PAUSE_S = 0.5


@dataclass
class Load:
    """Clients that ask again and again, each answer counted by its status.

    They pause between `more` and the next one, to leave the processor to what a test waits for,
    such as a process that starts.
    """

    url: str
    image: bytes
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    pause_s: float = 0.0

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60, verify=PLAIN) as client:
            while not self.stop.is_set():
                response = post(client, "/classify", self.image)
                self.statuses[response.status_code] += 1
                if response.status_code != 200:
                    self.failures.append(response.text)
                self.stop.wait(self.pause_s)


@contextmanager
def load(url: str, image: bytes, clients: int = 6) -> Iterator[Load]:
    made = Load(url, image)
    threads = [threading.Thread(target=made.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.stop.set()
        for thread in threads:
            thread.join()


def more(made: Load, count: int) -> None:
    """Until so many more answers have come."""
    made.pause_s = 0.0
    target = made.statuses.total() + count
    wait_until(lambda: made.statuses.total() >= target)
    made.pause_s = PAUSE_S


# -- workers with different models -----------------------------------------------------------


@contextmanager
def worker_thread(
    catalog: Path, address: str = "", **overrides: Any
) -> Iterator[tuple[str, LocalBackend]]:
    address = address or f"127.0.0.1:{free_port()}"
    settings = Settings(catalog=str(catalog), device="cpu", **overrides)
    metrics = Metrics(CollectorRegistry())
    registry = Registry.from_catalog(catalog, device="cpu", store=Store(catalog.parent / "store"))
    backend = LocalBackend(registry, settings.worker_options, metrics)
    with serving_rpc(backend, settings, metrics, address):
        yield address, backend


def test_requests_go_to_whoever_has_the_model(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    photo = jpegs["coffee"]
    with ExitStack() as stack:
        one, first = stack.enter_context(worker_thread(tiny_catalog, models="tiny"))
        two, second = stack.enter_context(worker_thread(tiny_catalog, models="conv"))
        whole = stack.enter_context(running(tiny_catalog))
        whole.wait_ready()
        _, client = stack.enter_context(gateway(Settings(admin_keys="boss"), one, two))
        wait_until(lambda: client.get("/readyz").status_code == 200)
        wait_until(lambda: bool(second.trunks.runners))
        wait_until(lambda: client.get("/models/conv").json()["state"] == "ready")
        for path in ("/classify?model=tiny", "/classify?model=conv", "/embed?model=conv"):
            assert post(client, path, photo).json() == post(whole.client, path, photo).json()
        models = {"models": ["conv", "tiny"]}
        together = post(client, "/predict", photo, b"no image", data=models).json()
        assert together == post(whole.client, "/predict", photo, b"no image", data=models).json()
        assert set(first.trunks.runners) == {"tiny"}

        unready = post(client, "/embed?model=tiny-embed", photo)
        assert unready.status_code == 503
        assert "unloaded" in unready.json()["detail"]
        assert unready.headers["Retry-After"]
        assert post(client, "/classify?model=none", photo).status_code == 404
        assert (
            post(client, "/classify?model=none", photo).json()["detail"]
            == (post(whole.client, "/classify?model=none", photo).json()["detail"])
        )
        boss = {"X-API-Key": "boss"}
        assert client.post("/models/tiny-embed/load", headers=boss).status_code == 403


def test_a_worker_that_drains_gets_no_new_requests(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(worker_thread(tiny_catalog, models="tiny")) for _ in "ab"]
        (one, first), (two, _) = workers
        _, client = stack.enter_context(gateway(Settings(), one, two))
        wait_until(lambda: all(worker.health().ready for _, worker in workers))
        wait_until(lambda: client.get("/readyz").json()["status"] == "ready")
        first.drain()
        wait_until(lambda: "draining" in client.get("/readyz").text)
        asked: list[InferRequest] = []

        async def infer(request: InferRequest) -> InferResult:
            asked.append(request)
            return await LocalBackend.infer(first, request)

        first.infer = infer  # type: ignore[method-assign]
        for _ in range(12):
            assert post(client, "/classify?model=tiny", jpegs["coffee"]).status_code == 200
        assert asked == []


def test_models_load_everywhere_and_keys_are_passed_on(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    keys: dict[str, Any] = {"api_keys": "user", "admin_keys": "boss"}
    with ExitStack() as stack:
        one, first = stack.enter_context(worker_thread(tiny_catalog, models="tiny", **keys))
        two, second = stack.enter_context(worker_thread(tiny_catalog, models="tiny", **keys))
        _, client = stack.enter_context(gateway(Settings(**keys), one, two))
        boss = {"X-API-Key": "boss"}
        wait_until(lambda: client.get("/readyz").status_code == 200)
        loaded = client.post("/models/conv/load", headers=boss)
        assert loaded.json()["state"] == "ready"
        for backend in (first, second):
            assert backend.registry.state("conv") == "ready"
        assert client.post("/models/none/load", headers=boss).status_code == 404
        unloaded = client.post("/models/conv/unload", headers=boss)
        assert unloaded.json()["state"] == "unloaded"


def reached(client: httpx.Client) -> set[str]:
    """The workers that the gateway reaches and that are ready, by its own word."""
    up = re.compile(r'^vitrail_gateway_worker_up\{worker="(.+)"\} 1\.0$', re.MULTILINE)
    reasons = client.get("/readyz").text
    found = up.findall(client.get("/metrics").text)
    return {address for address in found if f"worker {address}:" not in reasons}


def test_the_least_busy_worker_is_asked(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one worker is held up, all else goes to the other."""
    gate, jammed = threading.Event(), threading.Event()
    with ExitStack() as stack:
        workers = [stack.enter_context(worker_thread(tiny_catalog)) for _ in range(2)]
        addresses = {address for address, _ in workers}
        url, client = stack.enter_context(gateway(Settings(), *addresses))
        wait_until(lambda: reached(client) == addresses)
        for _, backend in workers:
            trunk = backend.trunks.runners["tiny"].trunk

            def jam_first(pixels: Any, need: Any, forward: Any = trunk.forward) -> Any:
                if not jammed.is_set():
                    jammed.set()
                    assert gate.wait(60)
                return forward(pixels, need)

            monkeypatch.setattr(trunk, "forward", jam_first)
        with load(url, jpegs["coffee"], clients=1):
            try:
                assert jammed.wait(30)
                soon = {"X-Timeout-Ms": "10000"}
                for _ in range(5):
                    answer = post(client, "/classify", jpegs["rocket"], headers=soon)
                    assert answer.status_code == 200
            finally:
                gate.set()


def test_a_worker_that_only_fails_is_left_alone_and_let_back(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.remote.ejection.EJECTION_S", 1.0)
    with ExitStack() as stack:
        one, sick = stack.enter_context(worker_thread(tiny_catalog))
        two, well = stack.enter_context(worker_thread(tiny_catalog))
        _, client = stack.enter_context(gateway(Settings(), one, two))
        wait_until(lambda: all(e.health().ready for e in (sick, well)))
        trunk = sick.trunks.runners["tiny"].trunk
        asked: list[int] = []
        broken = threading.Event()
        broken.set()
        forward = trunk.forward

        def fail(pixels: Any, need: Any) -> Any:
            asked.append(1)
            if broken.is_set():
                raise RuntimeError("kernel fault")
            return forward(pixels, need)

        monkeypatch.setattr(trunk, "forward", fail)

        def ask() -> int:
            return post(client, "/classify", jpegs["coffee"]).status_code

        def ejected() -> bool:
            before = len(asked)
            return [ask() for _ in range(12)] == [200] * 12 and len(asked) == before

        wait_until(ejected)
        broken.clear()

        def is_asked_again() -> bool:
            before = len(asked)
            assert ask() == 200
            return len(asked) > before

        wait_until(is_asked_again)


# -- workers that die --------------------------------------------------------------------------


def test_a_killed_worker_loses_nothing_and_takes_traffic_again(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    ports = [free_port(), free_port()]
    workers = [spawn_worker(port, tiny_catalog) for port in ports]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    try:
        with gateway(Settings(), *addresses) as (url, client):
            wait_until(lambda: reached(client) == set(addresses), 120)
            with load(url, jpegs["coffee"]) as made:
                more(made, 50)
                workers[0].kill()
                workers[0].wait()
                more(made, 100)
                assert reached(client) == {addresses[1]}
                workers[0] = spawn_worker(ports[0], tiny_catalog)
                wait_until(lambda: reached(client) == set(addresses), 120)
                more(made, 50)
                workers[1].kill()  # so that all answers from here are the first one's
                workers[1].wait()
                more(made, 50)
            assert made.statuses.keys() == {200}, made.failures
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_requests_wait_for_the_only_worker_to_come_back(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests whose worker died are answered once there is one again that has loaded."""
    monkeypatch.setenv("VITRAIL_MAX_QUEUE_DELAY_MS", "5000")  # so that they are still waiting
    port = free_port()
    worker = spawn_worker(port, tiny_catalog)
    try:
        with gateway(Settings(), f"127.0.0.1:{port}") as (_, client):
            wait_until(lambda: client.get("/readyz").status_code == 200, 120)
            outstanding = re.compile(r"^vitrail_gateway_worker_outstanding_images.* 4.0$", re.M)
            with ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(post, client, "/classify", jpegs["coffee"]) for _ in range(4)]
                wait_until(lambda: bool(outstanding.search(client.get("/metrics").text)))
                worker.kill()
                worker.wait()
                wait_until(lambda: client.get("/readyz").status_code == 503)
                late = post(client, "/classify", jpegs["rocket"])
                assert late.status_code == 503  # this one was never accepted
                assert late.headers["Retry-After"]
                monkeypatch.delenv("VITRAIL_MAX_QUEUE_DELAY_MS")
                worker = spawn_worker(port, tiny_catalog)
                assert [future.result().status_code for future in asked] == [200] * 4
    finally:
        worker.kill()
        worker.wait()


def test_a_request_that_kills_its_worker_is_sent_twice_and_takes_no_other_along(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker ends the poisonous calls as the connection to a dying process does: UNAVAILABLE,
    without an error of Vitrail's own. Second attempts are alone: one would otherwise end others."""
    monkeypatch.setattr("service.rpc.context.ERROR_KEY", "none-bin")
    attempts: list[str] = []
    running_now: set[str] = set()
    overlapped: list[set[str]] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(worker_thread(tiny_catalog)) for _ in range(3)]
        _, client = stack.enter_context(gateway(Settings(), *(address for address, _ in workers)))
        wait_until(lambda: all(backend.health().ready for _, backend in workers))
        wait_until(lambda: client.get("/readyz").json()["status"] == "ready")

        for _, backend in workers:

            async def infer(request: InferRequest, infer: Any = backend.infer) -> InferResult:
                name = request_id.get()
                if not name.startswith("poison"):
                    result: InferResult = await infer(request)
                    return result
                attempts.append(name)
                if attempts.count(name) == 2:
                    running_now.add(name)
                    if len(running_now) > 1:
                        overlapped.append(set(running_now))
                    await asyncio.sleep(0.05)
                    running_now.discard(name)
                raise UnavailableError("gone")

            monkeypatch.setattr(backend, "infer", infer)

        def ask(name: str) -> int:
            return post(
                client, "/classify", jpegs["coffee"], headers={"X-Request-ID": name}
            ).status_code

        names = [f"poison-{number}" for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, names)) == [503] * 4
        assert Counter(attempts) == dict.fromkeys(names, 2)
        assert overlapped == []
        wait_until(lambda: client.get("/readyz").json()["status"] == "ready")
        assert ask("innocent") == 200


def test_a_gateway_says_what_its_workers_are(tiny_catalog: Path) -> None:
    """Live all the time; degraded without one of two workers, not ready without both, and ready
    again when they are back."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]

    def status(client: httpx.Client) -> str:
        assert client.get("/healthz").status_code == 200
        answer: str = client.get("/readyz").json()["status"]
        return answer

    with gateway(Settings(), *addresses) as (_, client):
        assert status(client) == "not ready"
        for _ in range(2):
            with worker_thread(tiny_catalog, address=addresses[0]):
                wait_until(lambda: status(client) == "degraded")
                with worker_thread(tiny_catalog, address=addresses[1]):
                    wait_until(lambda: status(client) == "ready")
                wait_until(lambda: status(client) == "degraded")
            wait_until(lambda: status(client) == "not ready")


def test_a_gateway_is_ready_where_nothing_is_loaded_at_start(
    tiny_catalog: Path, tmp_path: Path
) -> None:
    catalog = tmp_path / "later.toml"
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    catalog.write_text(f"startup = []\n{text}")
    with worker_thread(catalog) as (address, _), gateway(Settings(), address) as (_, client):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/models/tiny").json()["state"] == "unloaded"


def test_no_worker_at_all_is_503_and_not_ready(jpegs: dict[str, bytes]) -> None:
    with gateway(Settings(), f"127.0.0.1:{free_port()}") as (_, client):
        answer = post(client, "/classify", jpegs["coffee"])
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        assert client.get("/models/any").status_code == 503


# -- discovery ---------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[Callable[[str], int]]:
    """Sets the last lines of /etc/hosts, and takes them away again."""
    path = Path("/etc/hosts")
    if not os.access(path, os.W_OK):
        pytest.skip("/etc/hosts is not writable here, so no name can change its addresses")
    before = path.read_text()
    try:
        yield lambda lines: path.write_text(f"{before}\n{lines}")
    finally:
        path.write_text(before)


def test_workers_follow_the_dns_name(
    tiny_catalog: Path,
    jpegs: dict[str, bytes],
    hosts: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.remote.workers.RESOLVE_INTERVAL_S", 0.1)
    port = free_port()
    settings = Settings(catalog=str(tiny_catalog), device="cpu")
    with ExitStack() as stack:
        for host in ("127.0.0.1", "127.0.0.2"):
            metrics = Metrics(CollectorRegistry())
            store = Store(tiny_catalog.parent / "store")
            registry = Registry.from_catalog(tiny_catalog, device="cpu", store=store)
            backend = LocalBackend(registry, settings.worker_options, metrics)
            stack.enter_context(serving_rpc(backend, settings, metrics, f"{host}:{port}"))
        hosts("127.0.0.1 vitrail-workers\n")
        name = f"dns:///vitrail-workers:{port}"
        _, client = stack.enter_context(gateway(Settings(), name))

        def known() -> set[str]:
            return {address.partition(":")[0] for address in reached(client)}

        wait_until(lambda: known() == {"127.0.0.1"})
        hosts("127.0.0.1 vitrail-workers\n127.0.0.2 vitrail-workers\n")
        wait_until(lambda: known() == {"127.0.0.1", "127.0.0.2"})
        hosts("127.0.0.2 vitrail-workers\n")
        wait_until(lambda: known() == {"127.0.0.2"})
        hosts("")
        time.sleep(0.3)
        assert known() == {"127.0.0.2"}  # a name that is gone keeps the addresses it had
        wait_until(lambda: post(client, "/classify", jpegs["coffee"]).status_code == 200)


# -- without torch -----------------------------------------------------------------------------


def test_the_gateway_process_needs_no_torch(
    tiny_catalog: Path, jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    with worker_thread(tiny_catalog) as (address, backend):
        wait_until(lambda: backend.health().ready)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with process("gateway", "--workers", address, "--port", str(port),
                     PYTHONPATH=str(tmp_path)) as started:  # fmt: skip
            wait_until(lambda: answers(f"{url}/readyz") or started.poll() is not None)
            with httpx.Client(base_url=url) as client:
                assert post(client, "/classify", jpegs["coffee"]).status_code == 200
                assert post(client, "/embed", jpegs["coffee"]).status_code == 200
                assert client.get("/v2/models/tiny").status_code == 200
            assert "libtorch" not in Path(f"/proc/{started.pid}/maps").read_text()
            started.send_signal(signal.SIGTERM)
            assert started.wait(30) == 0
