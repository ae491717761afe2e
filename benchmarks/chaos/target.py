"""The server that faults are injected into, with files of its own that may be damaged."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import marked_processes
from benchmarks.servers import MARK, Server, demo_server, free_port
from models.catalog import BUILT_IN
from models.checkpoints.store import default_store_path

WORKERS, GATEWAYS = 2, 2
RECOVERY_S = 120.0
BODY_TIMEOUT_S = 3
DISK_BYTES = 8 * 2**20
LOG = Path("runs/chaos.log")  # of the server
KINDS = {
    "worker": "service.cli worker",
    "gateway": "service.cli gateway",
    "decoder": "service.decoding.decoder",
    "supervisor": "service.cli serve",
}
ADMIN = {"X-API-Key": "admin"}


class Target:
    """`vitrail serve` with two workers and two gateways. Use `started`.

    Attributes:
        model: the name of the model that is asked, which is that of its trunk, too.
        embedding: a model on the same trunk that embeds.
        catalog: the catalog's file, a copy.
        store: the folder of downloads, a copy.
        disk: the folder of heads and collections: a small file system of its own where this process
            may mount one.
    """

    def __init__(self, folder: Path, catalog: str, model: str) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.embedding = model, f"{model}-embed"
        original = Path(catalog) if catalog.endswith(".toml") else BUILT_IN / f"{catalog}.toml"
        without = shutil.ignore_patterns("store", "tmp-*")
        shutil.copytree(original.parent, folder / "catalog", ignore=without)
        self.catalog = folder / "catalog" / original.name
        self.store = folder / "store"
        if default_store_path().exists():
            shutil.copytree(default_store_path(), self.store, ignore=without, copy_function=_link)
        self.disk = folder / "disk"
        self.disk.mkdir()
        self._fault = folder / "fault"
        self._fault.write_text("")
        self._servers = ExitStack()
        self._server: Server | None = None

    @classmethod
    @contextmanager
    def started(cls, catalog: str, model: str) -> Iterator["Target"]:
        """A context with a server that is ready."""
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder, ExitStack() as stack:
            target = cls(Path(folder), catalog, model)
            stack.enter_context(_mounted(target.disk))
            stack.enter_context(target._servers)
            target.start()
            yield target

    def start(self) -> None:
        """Start the server; again, if its supervisor has died."""
        flags = ["--workers", str(WORKERS), "--processes", str(GATEWAYS)]
        flags += ["--catalog", str(self.catalog), "--grpc-port", str(self.grpc_port)]
        models = f"{self.model},{self.embedding}"
        server = demo_server(self.port, models, *flags, environment=self.environment, log=LOG)
        self._server = self._servers.enter_context(server)
        self.wait_whole()

    @property
    def environment(self) -> dict[str, str]:
        """The server's settings."""
        inside = str(Path(__file__).parent / "inside")
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, (inside, os.environ.get("PYTHONPATH")))),
            "CHAOS_FAULT": str(self._fault),
            "VITRAIL_ADMIN_KEYS": ADMIN["X-API-Key"],
            "VITRAIL_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
            "VITRAIL_COLLECTIONS": str(self.disk / "collections"),
            # All photos are decoded in processes, so that these have work when they are killed.
            "VITRAIL_DECODERS": "processes",
            "VITRAIL_HEADS_FOLDER": str(self.disk / "heads"),
            "VITRAIL_STORE": str(self.store),
        }

    @property
    def resident_bytes(self) -> int:
        """Memory of all processes. Shared pages count once for each of them."""
        assert self._server is not None
        return self._server.usage().resident_bytes

    def pids(self, kind: str) -> list[int]:
        """The processes of a kind, see `KINDS`."""
        assert self._server is not None
        found = []
        for pid in marked_processes(MARK, self._server.mark):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if KINDS[kind] in command:
                    found.append(pid)
        return found

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """A context in which the workers have a fault of `inside/sitecustomize.py`."""
        self._fault.write_text(name)
        try:
            yield
        finally:
            self._fault.write_text("")

    def replaced(self, kind: str, number: signal.Signals) -> None:
        """Send a signal that ends or stops one process of a kind; wait until all is well again."""
        victim = self.pids(kind)[0]
        os.kill(victim, number)
        wait_until(lambda: victim not in self.pids(kind))
        self.wait_whole()

    def wait_whole(self) -> None:
        """Wait until all processes run, and the gateways reach all workers."""
        wait_until(self._is_whole)

    def _is_whole(self) -> bool:
        if len(self.pids("worker")) < WORKERS or len(self.pids("gateway")) < GATEWAYS:
            return False
        if not all(_listens(pid, self.port) for pid in self.pids("gateway")):
            return False
        try:  # on several connections, so that both gateways are asked
            answers = [httpx.get(f"{self.url}/readyz", timeout=10).json() for _ in range(4)]
        except (httpx.TransportError, ValueError):
            return False
        return all(answer["status"] == "ready" for answer in answers)

    def ask(self, method: str, path: str, **given: Any) -> int:
        """The status of an administrator's request."""
        answer = httpx.request(method, self.url + path, headers=ADMIN, timeout=120, **given)
        return answer.status_code


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: it is not after RECOVERY_S.
    """
    end = time.monotonic() + RECOVERY_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not everything ran again within {RECOVERY_S:g} s")
        time.sleep(0.1)


def _link(source: str, target: str) -> None:
    """Copy a file by a link. What changes files of a store puts new ones in their places."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _listens(pid: int, port: int) -> bool:
    """Whether a process looks for connections to a port of this machine: `fdinfo` of its epoll
    instances (see proc(5)) has the inode of the port's listening socket. Gateways share the socket,
    so that another one answers while this one starts."""
    inodes = {
        f"ino:{int(fields[9]):x}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port
    }
    with suppress(OSError):  # it has ended
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if inodes & set(entry.read_text().split()):
                    return True
    return False


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    """A context in which a folder is a small file system, if this process may mount one."""
    size = f"size={DISK_BYTES}"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield
    finally:
        if mount.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
