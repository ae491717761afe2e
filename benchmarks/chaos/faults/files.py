"""Faults of the disk and of the files on it."""

import io
import os
import signal
import time
import zipfile

from benchmarks.chaos.faults.fault import FAULT_S, SkippedError
from benchmarks.chaos.faults.processes import killed
from benchmarks.chaos.target import Target
from benchmarks.photos import jpegs


def disk_full(target: Target) -> None:
    """Heads and collections refuse; a worker that is killed meanwhile comes back."""
    if not target.disk.is_mount():
        raise SkippedError("this process may not mount a file system")
    collection = "/collections/chaos"
    assert target.ask("PUT", collection, json={"model": target.embedding}) in (200, 201)
    filler = target.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    try:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as content:
            for number in range(16):
                content.writestr(f"{number % 2}/{number}.jpg", jpegs()[number % 4])
        statuses = {
            "head": target.ask(
                "POST", "/heads", files={"archive": archive.getvalue()},
                data={"name": "chaos", "trunk": target.model, "kind": "linear"},
            ),
            "image": target.ask("POST", f"{collection}/images", content=jpegs()[0]),
        }  # fmt: skip
        assert set(statuses.values()) == {507}, statuses
        killed("worker", target)
    finally:
        filler.unlink()
    assert target.ask("POST", f"{collection}/images", content=jpegs()[0]) == 200
    assert target.ask("DELETE", collection) == 204


def cache_damaged(target: Target) -> None:
    """All downloaded and compiled files are damaged, and a worker is killed."""
    for path in target.store.rglob("*"):
        if path.is_file() and path.suffix not in (".lock", ".sha256"):
            with path.open("rb") as file:
                damaged = bytearray(file.read(1024))
            damaged[100:200] = bytes(100)
            path.with_suffix(".damaged").write_bytes(damaged)
            path.with_suffix(".damaged").replace(path)
    killed("worker", target)


def catalog_damaged(target: Target) -> None:
    """A worker that is killed meanwhile comes back when the file is mended."""
    content = target.catalog.read_text()
    target.catalog.write_text("[models.broken\n")
    try:
        victim = target.pids("worker")[0]
        os.kill(victim, signal.SIGKILL)
        time.sleep(2 * FAULT_S)
    finally:
        target.catalog.write_text(content)
    target.wait_whole()


def head_damaged(target: Target) -> None:
    """A worker that is killed serves everything else."""
    damaged = target.disk / "heads" / "damaged.safetensors"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"\xff" * 1000)
    try:
        killed("worker", target)
        assert target.ask("GET", "/heads/damaged") == 200
    finally:
        damaged.unlink()
