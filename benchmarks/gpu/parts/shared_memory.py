"""Tensors in memory that clients share with the server, over `/v2`."""

import base64
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from benchmarks.gpu.memory import DeviceMemory, Shared, SystemMemory
from benchmarks.gpu.networks import catalog, load_trunk
from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.servers import Server, free_port

IMAGES = 4
OUTPUT_BYTES = 2**20
REGION = "region"
# More than an allocation may be rounded up to.
BEYOND = 2**28
# Largest difference over the largest value: both are one pass of the same images.
TOLERANCE = 1e-5


def shared_memory(options: Options) -> Rows:
    """A server reads images from memory of this process, and writes embeddings there: the same as
    in the body, and how long each takes. System memory, and on a GPU also the device's."""
    network = options.networks[0]
    size = load_trunk(options, network, "eager", "float32").preprocess.input_size
    pixels = np.random.default_rng(0).standard_normal((IMAGES, 3, *size), dtype=np.float32)
    model = f"{network}-embed"
    name, port = f"vitrail_benchmark_{os.getpid()}", free_port()
    command = [
        sys.executable, "-m", "service.cli", "serve", "--catalog", str(catalog(options, network)),
        "--port", str(port), "--grpc-port", str(free_port()), "--device", str(options.device),
        "--precision", options.precision, "--engine", "eager", "--log-level", "warning",
    ]  # fmt: skip
    environment = {"VITRAIL_SHARED_MEMORY": name}
    log = options.folder / "logs" / "shared-memory.log"
    with Server(command, port, environment=environment, log=log):
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        try:
            total = pixels.nbytes + OUTPUT_BYTES
            with SystemMemory(name, total) as system:
                client.register_system_shared_memory(REGION, name, total)
                yield {"memory": "system", **_compared(options, client, model, pixels, system)}
                client.unregister_system_shared_memory(REGION)
            if not options.is_gpu:
                reason = "needs a GPU; tests/service/test_cuda_memory.py has a stand-in"
                yield {"memory": "cuda", "refused": reason}
                return
            with DeviceMemory(options.device.index or 0, total) as device:
                yield from _device(options, client, model, pixels, device)
        finally:
            client.close()


def _device(
    options: Options, client: Any, model: str, pixels: np.ndarray, device: DeviceMemory
) -> Rows:
    number, total = options.device.index or 0, pixels.nbytes + OUTPUT_BYTES

    def register(size: int) -> None:
        handle = base64.b64encode(device.handle)
        client.register_cuda_shared_memory(REGION, handle, number, size)

    register(total)
    yield {"memory": "cuda", **_compared(options, client, model, pixels, device)}
    client.unregister_cuda_shared_memory(REGION)
    attempts: dict[str, Callable[[], object]] = {
        "more bytes than there are": lambda: register(total + BEYOND),
        "unregistered": lambda: _ask(client, model, pixels, shared=True),
    }
    for name, attempt in attempts.items():
        said = _refusal(attempt)
        yield {"memory": "cuda", "attempt": name, "said": said, "holds": said is not None}
    register(total)  # opened again
    yield {"memory": "cuda", **_compared(options, client, model, pixels, device)}
    client.unregister_cuda_shared_memory()


def _compared(options: Options, client: Any, model: str, pixels: np.ndarray, memory: Shared) -> Row:
    """What comes of images in memory against images in the body, and the time of each. The error is
    the largest of all requests; each finds NaNs where its output goes."""
    memory.write(pixels.tobytes())
    plain = _ask(client, model, pixels, shared=False).as_numpy("embedding")
    times: dict[bool, list[float]] = {False: [], True: []}
    errors = []
    for _ in range(3 if options.quick else 50):
        memory.write(np.full_like(plain, np.nan).tobytes(), pixels.nbytes)
        for shared, own in times.items():
            started = time.perf_counter()
            _ask(client, model, pixels, shared=shared)
            own.append(time.perf_counter() - started)
        there = np.frombuffer(memory.read(pixels.nbytes, plain.nbytes), np.float32)
        errors.append(np.abs(there.reshape(plain.shape) - plain).max() / np.abs(plain).max())
    error = float(np.max(errors))  # NaN if any is
    return {
        "network": options.networks[0],
        "images": IMAGES,
        "error": error,
        "p50_ms": statistics.median(times[True]) * 1e3,
        "in_body_p50_ms": statistics.median(times[False]) * 1e3,
        "holds": error <= TOLERANCE,
    }


def _ask(client: Any, model: str, pixels: np.ndarray, *, shared: bool) -> Any:
    images = triton.InferInput("pixel_values", list(pixels.shape), "FP32")
    embedding = triton.InferRequestedOutput("embedding")
    if shared:
        images.set_shared_memory(REGION, pixels.nbytes)
        embedding.set_shared_memory(REGION, OUTPUT_BYTES, offset=pixels.nbytes)
    else:
        images.set_data_from_numpy(pixels)
    return client.infer(model, [images], outputs=[embedding])


def _refusal(attempt: Callable[[], object]) -> str | None:
    """What the server says to an attempt; None if it takes it."""
    try:
        attempt()
    except InferenceServerException as error:
        return str(error.message())
    return None
