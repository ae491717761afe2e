"""Networks as they are served: tensors in, JPEG files in, and two tasks at a time."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.networks import load_trunk
from benchmarks.gpu.options import Options, Rows
from benchmarks.gpu.serving import serve, served_networks
from benchmarks.gpu.timing import rate_of
from benchmarks.photos import jpegs
from models.inference import decode
from models.inputs.images import DEFAULT_LIMITS
from models.trunks.base import Trunk
from service.types import Call


def tensor_in(options: Options) -> Rows:
    """Served in process: normalised tensors in, the best classes out."""
    for network, engine in served_networks(options):

        def inputs(trunk: Trunk) -> list[Any]:
            size = trunk.preprocess.input_size
            chance = np.random.default_rng(0)
            return [chance.standard_normal((3, *size), dtype=np.float32) for _ in range(8)]

        yield from serve(options, network, engine, inputs)


def jpeg_in(options: Options) -> Rows:
    """Served in process: JPEG files in, by each way of decoding; and decoding alone."""
    photos = jpegs()
    for network, engine in served_networks(options):
        for where in ("threads", "auto"):
            rows = serve(options, network, engine, lambda _: photos, decoders=where)
            yield from ({**row, "decoders": where} for row in rows)
    yield from _decoding(options, photos)


def mixed(options: Options) -> Rows:
    """Two tasks of one trunk at a time, in the same batches."""
    for network, engine in served_networks(options):
        calls = [[Call(network, None)], [Call(f"{network}-embed", None)]]
        yield from serve(options, network, engine, lambda _: jpegs(), calls=calls)


def _decoding(options: Options, photos: list[bytes]) -> Rows:
    """Images per second of decoding and transforming alone, on all cores; and of nvJPEG."""
    trunk = load_trunk(options, options.networks[0], "eager", "float32")
    cores = len(os.sched_getaffinity(0))

    def one(number: int) -> None:
        trunk.prepare(decode(photos[number % len(photos)], DEFAULT_LIMITS))

    with ThreadPoolExecutor(cores) as pool:
        count, started = 64, time.perf_counter()
        list(pool.map(one, range(count)))
        yield {"decoding": f"exact, {cores} threads",
               "images_per_s": count / (time.perf_counter() - started)}  # fmt: skip
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
