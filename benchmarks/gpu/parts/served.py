"""Networks as they are served: tensors in, JPEG files in, and two tasks at a time."""

import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch.nn.functional import cosine_similarity

from benchmarks.gpu.networks import load_trunk
from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.serving import ceiling_of, serve, served_networks, verdict
from benchmarks.gpu.timing import rate_of
from benchmarks.photos import SIZES, encode, jpegs
from benchmarks.photos import photos as sample_photos
from models.errors import CatalogError
from models.inputs.images import DEFAULT_LIMITS, decode_image
from models.inputs.nvjpeg import DecodeJpegs, create_jpeg_decoder
from models.trunks.base import Trunk
from models.trunks.jpeg_batch import JpegBatch
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
    """Decoding alone; then served in process: JPEG files in, by each way of decoding. Last the
    transform `gpu`: decoding alone, served, and how far it is from the exact transform."""
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
    yield from _by_gpu(options, photos)


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


def _by_gpu(options: Options, photos: list[bytes]) -> Rows:
    try:
        decode = create_jpeg_decoder(options.device)
    except CatalogError as error:
        yield {"transform": "gpu", "refused": str(error)}
        return
    files = photos * (1 if options.quick else 16)
    rate = rate_of(options, lambda: decode(files), len(files))
    yield {"decoding": "nvJPEG, in batches, without a transform", "images_per_s": rate}
    samples = [encode(photo) for photo in sample_photos(SIZES["small"])]
    yield _cut_off(decode, samples)
    for network in options.networks:
        trunk = load_trunk(options, network, "eager", "float32", "gpu")
        batch = _batch(trunk, files)
        rate = rate_of(options, partial(batch.to, options.device), len(files))
        row = {"network": network, "decoding": "nvJPEG, with the transform", "images_per_s": rate}
        yield {**row, **_error(options, network, trunk, samples)}
        batch = _batch(trunk, [_refused(files[0]), *files[1:]])
        rate = rate_of(options, partial(batch.to, options.device), len(files))
        decoding = "nvJPEG, with the transform, one file refused"
        yield {
            "network": network,
            "decoding": decoding,
            "images_per_s": rate,
            "not_decoded": len(batch.refused),
        }
    for network, engine in served_networks(options):
        for row in serve(options, network, engine, lambda _: photos, transform="gpu"):
            yield {**row, "transform": "gpu"}


def _cut_off(decode: DecodeJpegs, photos: list[bytes]) -> Row:
    """Whether a file that is cut off in its middle has the same pixels after each of two photos of
    its size: others would be what the memory held before."""
    cut, *others = photos[:3]
    cut = cut[: len(cut) // 2].rstrip(b"\xff") + b"\xff\xd9"
    row: Row = {"decoding": "nvJPEG, a file that is cut off"}
    found = []
    for other in others:
        decode([other])
        try:
            found.append(decode([cut])[0].cpu())  # its memory is for the next one
        except RuntimeError as error:
            return {**row, "refused": str(error)}
    is_same = torch.equal(*found)
    return {**row, "is_same": is_same, "holds": is_same}


def _refused(data: bytes) -> bytes:
    """The file with a scan of a component that it does not have."""
    component = data.index(b"\xff\xda") + 5
    return data[:component] + b"\x09" + data[component + 1 :]


def _batch(trunk: Trunk, files: list[bytes]) -> JpegBatch:
    batch = trunk.batch([trunk.open_jpeg(data, DEFAULT_LIMITS) for data in files])
    assert isinstance(batch, JpegBatch)
    return batch


@torch.inference_mode()
def _error(options: Options, network: str, trunk: Trunk, files: list[bytes]) -> Row:
    """How far pixels and logits of the transform `gpu` are from the exact ones, in float32."""
    batch = _batch(trunk, files)
    found = batch.to(options.device)
    exact = load_trunk(options, network, "eager", "float32")
    prepared = [exact.prepare(decode_image(data)) for data in files]
    expected = exact.collate(prepared).to(options.device)
    levels = (found.int() - expected.int()).abs().float()
    ours, theirs = (trunk.classify(trunk.forward(pixels)).float() for pixels in (found, expected))
    return {
        "photos": len(files),
        "not_decoded": len(batch.refused),
        "largest_difference": levels.max().item(),
        "mean_difference": levels.mean().item(),
        "share_that_differs": (levels > 0).float().mean().item(),
        "logit_error": ((ours - theirs).abs().max() / theirs.abs().max()).item(),
        "top1_agreement": (ours.argmax(1) == theirs.argmax(1)).float().mean().item(),
        "least_cosine": cosine_similarity(ours, theirs).min().item(),
    }
