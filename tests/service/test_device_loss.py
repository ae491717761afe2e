"""What a worker does about a GPU that fails. The errors are injected: no GPU is needed."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from models.trunks.device_errors import is_lost, is_out_of_memory
from service.exit_status import DEVICE_LOST
from service.worker.batch_limit import FIRST_PATIENCE, MAX_PATIENCE, BatchLimit
from tests.conftest import answers, free_port, wait_until
from tests.test_architecture import ROOT

CPU = torch.device("cpu")

# An engine that finds its GPU lost as soon as a file is there, once.
FAILING = '''
"""Loses its device on demand."""

import os
from pathlib import Path

import torch

from models.trunks.engines.eager import Eager


class Failing(Eager):
    name = "failing"

    def run(self, plan, inputs):
        lost = Path(os.environ["TEST_LOST"])
        if lost.exists():
            lost.unlink()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().run(plan, inputs)
'''


@pytest.mark.parametrize(
    ("error", "lost", "out_of_memory"),
    [
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors"), True, False),
        (RuntimeError("CUDA error: unknown error"), True, False),
        (RuntimeError("CUDA error: invalid argument"), False, False),
        (RuntimeError("CUDA error: out of memory"), False, True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False, True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False, True),
        (ValueError("OutOfMemoryError: CUDA out of memory. Tried to allocate"), False, True),
        (RuntimeError("Failed to decode batch: 5"), False, True),
        (RuntimeError("Failed to initialize nvjpeg with hardware backend: 5"), False, True),
        (RuntimeError("Failed to decode batch: 4"), False, False),
        (RuntimeError("Failed to synchronize CUDA stream: 5"), False, False),
        (RuntimeError("the shapes do not match: unknown error"), False, False),
        (ValueError("CUDA error: unspecified launch failure"), False, False),
    ],
)
def test_errors_of_the_device_are_told_from_those_of_an_input(
    error: Exception, lost: bool, out_of_memory: bool
) -> None:
    assert is_lost(error, CPU) is lost
    assert is_out_of_memory(error) is out_of_memory


def test_the_words_of_errors_that_stay_are_those_of_the_installed_cuda() -> None:
    """`cudaGetErrorString` needs no GPU."""
    folder = Path(torch.__file__).parents[1] / "nvidia"
    library = next(folder.glob("**/libcudart.so*"), None)
    if library is None:
        pytest.skip("torch is a build for CPUs")
    words_of = ctypes.CDLL(str(library)).cudaGetErrorString
    words_of.restype = ctypes.c_char_p
    texts = {code: f"CUDA error: {words_of(code).decode()}" for code in range(1, 1000)}
    lost = {code for code, text in texts.items() if is_lost(RuntimeError(text), CPU)}
    # Those after which, says CUDA's documentation, a process has to end; a GPU that is not there,
    # that another process has, or that is being shut down; and an unknown error.
    stay = {214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 911}
    assert lost == stay | {4, 46, 53, 100, 810, 999}


def test_memory_that_runs_out_in_a_capture_is_told_by_its_context() -> None:
    ended = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert not is_out_of_memory(ended)
    ended.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert is_out_of_memory(ended)
    assert not is_lost(ended, CPU)
    other = RuntimeError("of another kind")
    other.__context__ = ended.__context__
    assert not is_out_of_memory(other)


def test_a_worker_whose_assigned_gpu_cannot_be_used_exits_for_a_restart() -> None:
    """Not with the status of wrong settings, at which the supervisor stops all workers."""
    command = [sys.executable, "-m", "service.cli", "worker", "--assigned-gpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == DEVICE_LOST, ended.stderr
    assert "torch sees none" in ended.stderr


def test_the_batch_limit_recovers_and_waits_longer_each_time_that_memory_runs_out() -> None:
    limit = BatchLimit(64)
    limit.ran(64)
    assert limit.value == 64

    def batches_until_grown() -> int:
        value, count = limit.value, 0
        while limit.value == value:
            limit.ran(value // 2)  # not full: shows nothing about larger ones
            limit.ran(value)
            count += 1
        return count

    limit.ran_out(64)
    limit.ran_out(32)
    assert limit.value == 16
    assert batches_until_grown() == 4 * FIRST_PATIENCE
    assert limit.value == 32
    limit.ran_out(32)
    assert batches_until_grown() == 8 * FIRST_PATIENCE
    batches_until_grown()
    assert limit.value == 64
    for _ in range(20):
        limit.ran_out(1)
    assert limit.value == 1
    assert batches_until_grown() == MAX_PATIENCE


def test_a_worker_that_loses_its_device_exits_and_is_replaced(
    tmp_path: Path, tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    for package in ("models", "service"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    (tmp_path / "models/trunks/engines/failing.py").write_text(FAILING)
    port, lost = free_port(), tmp_path / "lost"
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", "--workers", "1", "--catalog", str(tiny_catalog), "--models", "conv"]
    arguments += ["--device", "cpu", "--port", str(port), "--grpc-port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TEST_LOST": str(lost)}
    environment["VITRAIL_ENGINE"] = "failing"
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "service.cli", *arguments],
            cwd=tmp_path, env=environment, stderr=file,
        ) as supervisor,
    ):  # fmt: skip

        def classify() -> int:
            params = {"model": "conv"}
            return httpx.post(
                f"{url}/classify", content=jpegs["coffee"], params=params, timeout=60
            ).status_code

        try:
            wait_until(lambda: answers(f"{url}/readyz") or supervisor.poll() is not None, 120)
            assert classify() == 200
            lost.touch()
            assert classify() in (200, 503)  # 200 if the new worker was there in time
            assert not lost.exists()
            wait_until(lambda: f"status {DEVICE_LOST} after" in log.read_text(), 60)
            wait_until(lambda: answers(f"{url}/readyz"), 120)
            assert classify() == 200
        finally:
            supervisor.terminate()
            supervisor.wait(60)
