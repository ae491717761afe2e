"""What a rolling update of the Helm chart does to requests: the commands of the old pods and of the
new ones run as processes, with what kubelet and a Service do beside them."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import free_port, wait_until
from tests.pods import ask_grpc, ask_http, container_process, rendered_with

# Real ones are 5 s each; here a test waits for them.
PROBE_INTERVAL_S = 0.5
DRAIN_DELAY_S = 3
# Endpoints change at the time of SIGTERM; the nodes learn of it later.
ENDPOINTS_DELAY_S = 1.0


class Service:
    """Gives connections to the pods whose readiness probe succeeded last."""

    def __init__(self) -> None:
        self._pods: dict[str, dict[str, Any]] = {}
        self._ready: list[str] = []
        self._stop = threading.Event()
        self._kubelet = threading.Thread(target=self._probe)

    def __enter__(self) -> "Service":
        self._kubelet.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._kubelet.join()

    def add(self, address: str, container: dict[str, Any]) -> None:
        """Add a pod, and wait until it is ready."""
        self._pods[address] = container["readinessProbe"]
        wait_until(lambda: address in self._ready, 120)

    def remove(self, address: str) -> None:
        """Give no new connections to a pod."""
        del self._pods[address]

    def choose(self) -> str:
        """The address of a ready pod."""
        return random.choice(self._ready)

    def _probe(self) -> None:
        while not self._stop.wait(PROBE_INTERVAL_S):
            self._ready = [a for a, probe in list(self._pods.items()) if ask_http(probe, a)]


class Clients:
    """Threads that classify a photo over and over. Half of them keep a connection for as long as
    the server lets them, which therefore stays with one pod; the others open one for each request.

    Attributes:
        statuses: how many requests were answered with which status, or ended by which error.
    """

    def __init__(self, service: Service, photo: bytes, count: int = 4) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._service = service
        self._photo = photo
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(n % 2 == 0,)) for n in range(count)
        ]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """Wait for so many more requests to be answered."""
        end = self.statuses.total() + count
        wait_until(lambda: self.statuses.total() >= end)

    def _ask(self, keeps: bool) -> None:
        while not self._stop.is_set():
            with httpx.Client(base_url=f"http://{self._service.choose()}", timeout=60) as client:
                is_open = self._send(client)
                while keeps and is_open and not self._stop.is_set():
                    is_open = self._send(client)

    def _send(self, client: httpx.Client) -> bool:
        """Send a request. Returns whether the server keeps the connection."""
        try:
            answer = client.post("/classify", content=self._photo)
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return False
        self.statuses[answer.status_code] += 1
        return bool(answer.headers.get("Connection") != "close")


@contextmanager
def worker_pod(
    manifests: list[dict[str, Any]], address: str, catalog: Path, store: Path
) -> Iterator[None]:
    """A worker's pod, ready; at the end it gets SIGTERM and is waited for."""
    own = {
        "VITRAIL_GRPC_PORT": address.rpartition(":")[2],
        "VITRAIL_METRICS_PORT": "0",
        "VITRAIL_CATALOG": str(catalog),
    }
    with container_process(manifests, "demo-worker-cpu", store, **own) as container:
        wait_until(lambda: ask_grpc(container["readinessProbe"], address), 120)
        yield


@contextmanager
def gateway_pod(
    manifests: list[dict[str, Any]], workers: list[str], service: Service, store: Path
) -> Iterator[None]:
    """A gateway's pod, ready; at the end it gets SIGTERM and is waited for."""
    address = f"127.0.0.1:{free_port()}"
    own = {
        "dns:///demo-workers:8001": ",".join(workers),
        "VITRAIL_PORT": address.rpartition(":")[2],
    }
    with container_process(manifests, "demo-gateway", store, **own) as container:
        service.add(address, container)
        yield
        threading.Timer(ENDPOINTS_DELAY_S, service.remove, [address]).start()


@pytest.mark.nightly
def test_a_rolling_update_loses_no_request(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    """Both old pods get SIGTERM at once, when the new ones beside them are ready."""
    old, new = (
        rendered_with(
            drainDelaySeconds=DRAIN_DELAY_S, gateway={"env": {"VITRAIL_LOG_LEVEL": level}}
        )
        for level in ("warning", "info")
    )
    workers = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with ExitStack() as pods, Service() as service, ThreadPoolExecutor() as both:
        old_worker, old_gateway = (pods.enter_context(ExitStack()) for _ in range(2))
        old_worker.enter_context(worker_pod(old, workers[0], tiny_catalog, tmp_path))
        old_gateway.enter_context(gateway_pod(old, workers, service, tmp_path))
        with Clients(service, jpegs["coffee"]) as clients:
            clients.wait_for(20)
            pods.enter_context(worker_pod(new, workers[1], tiny_catalog, tmp_path))
            pods.enter_context(gateway_pod(new, workers, service, tmp_path))
            clients.wait_for(20)
            list(both.map(ExitStack.close, (old_worker, old_gateway)))
            clients.wait_for(20)
    assert set(clients.statuses) == {200}, clients.statuses
