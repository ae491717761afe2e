"""Networks as they are served: tensors in, JPEG files in, and two tasks at a time."""

import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from benchmarks.gpu.networks import load_trunk
from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.serving import ceiling_of, serve, served_networks, verdict
from benchmarks.gpu.timing import rate_of
from benchmarks.photos import jpegs
from models.inference import decode
from models.inputs.images import DEFAULT_LIMITS
from models.trunks.base import Trunk
from service.decoding.pool import create_decoder
from service.metrics import Metrics
from service.types import Call
from service.worker.runner import use_threads
from service.worker_options import WorkerOptions

# Images of a request from clients that have several.
IMAGES = 16
DECODERS = ("threads", "auto")


def tensor_in(options: Options) -> Rows:
    """Served in process: normalised tensors in, one or several a request; the best classes out."""

    def inputs(trunk: Trunk) -> list[Any]:
        size = trunk.preprocess.input_size
        chance = np.random.default_rng(0)
        return [chance.standard_normal((3, *size), dtype=np.float32) for _ in range(8)]

    rows: dict[str, list[Row]] = defaultdict(list)
    for network, engine in served_networks(options):
        for images in (1, IMAGES):
            for row in serve(options, network, engine, inputs, images=images):
                rows[network].append(row)
                yield row
    for network, own in rows.items():
        yield from verdict(options, network, own, ceiling_of(options, network), 0.95)


def jpeg_in(options: Options) -> Rows:
    """Decoding alone; then served in process: JPEG files in, by each way of decoding."""
    photos = jpegs()
    rows: dict[str, list[Row]] = defaultdict(list)
    decoded: dict[str, float] = {}
    for network, engine in served_networks(options):
        if network not in decoded:
            trunk = load_trunk(options, network, "eager", "float32")
            rates = {where: _decoding_rate(options, trunk, photos, where) for where in DECODERS}
            decoded[network] = max(rates.values())
            for where, rate in rates.items():
                yield {"network": network, "decoding": where, "images_per_s": rate}
        for where in DECODERS:
            for row in serve(options, network, engine, lambda _: photos, decoders=where):
                rows[network].append(row)
                yield {**row, "decoders": where}
    for network, own in rows.items():
        bound = min(decoded[network], ceiling_of(options, network) or math.inf)
        yield from verdict(options, network, own, bound, 0.9)
    yield from _nvjpeg(options, photos)


def mixed(options: Options) -> Rows:
    """Two tasks of one trunk at a time, in the same batches."""
    for network, engine in served_networks(options):
        calls = [[Call(network, None)], [Call(f"{network}-embed", None)]]
        yield from serve(options, network, engine, lambda _: jpegs(), calls=calls)


def _decoding_rate(options: Options, trunk: Trunk, photos: list[bytes], where: str) -> float:
    """Images per second of decoding and transforming alone, with a worker's threads."""
    worker = WorkerOptions().resolve(options.device.type)
    metrics = Metrics(CollectorRegistry())
    decoder = create_decoder(where, worker.image_limits, worker.decode_cpu_s, metrics)
    started = time.perf_counter()

    def decode_some(thread: int) -> int:
        use_threads(1)
        count = 0
        while time.perf_counter() - started < options.seconds:
            with decoder.decoded(photos[(thread + count) % len(photos)], None) as image:
                trunk.prepare(image)
            count += 1
        return count

    decoder.start()
    try:
        with ThreadPoolExecutor(worker.decode_threads) as pool:
            count = sum(pool.map(decode_some, range(worker.decode_threads)))
    finally:
        decoder.close()
    return count / (time.perf_counter() - started)


def _nvjpeg(options: Options, photos: list[bytes]) -> Rows:
    """Decoding alone on the GPU, and how far its pixels are from the exact ones."""
    if not options.is_gpu:
        yield {"decoding": "nvJPEG", "refused": "needs a GPU"}
        return
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError) as error:
        yield {"decoding": "nvJPEG", "refused": f"pip install torchcodec: {error}"[:300]}
        return
    files = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in photos * 16]
    rate = rate_of(options, lambda: decode_jpeg(files, device=options.device), len(files))
    row = {"decoding": "nvJPEG, in batches, without a transform", "images_per_s": rate}
    yield {**row, "largest_difference": _largest_difference(decode_jpeg, photos, options)}


def _largest_difference(decode_jpeg: Any, photos: list[bytes], options: Options) -> float:
    """The most levels of 255 by which a pixel of nvJPEG's differs from the exact decoder's."""
    differences = []
    for photo, found in zip(photos, decode_jpeg(photos, device=options.device), strict=True):
        exact = torch.from_numpy(np.array(decode(photo, DEFAULT_LIMITS))).permute(2, 0, 1)
        differences.append(int((found.cpu().int() - exact.int()).abs().max()))
    return max(differences)
