"""The parts of `benchmarks.gpu`. Each returns rows of figures; see `PARTS`."""

import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.gpu_models import Options, Served, load_trunk, served
from benchmarks.heads import Bench, Requests, random_head
from benchmarks.load import percentile
from benchmarks.photos import jpegs
from models import load_checkpoint
from models.errors import ModelsError
from models.heads.registry import create_head
from models.inference import HeadCall, decode, run_rows, start_pass
from models.inputs.images import DEFAULT_LIMITS
from models.model import Model
from models.trunks.base import Trunk
from models.trunks.compute_stream import compute_stream
from models.trunks.devices import Placement, resolve_precision
from models.trunks.engines.registry import engine_class
from models.trunks.features import LAST_OUTPUT
from service.errors import ServiceError
from service.types import Call

Row = dict[str, Any]
Rows = Iterator[Row]

# Largest error over the largest value, by precision: exact, and what reduced precisions may have.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
# What is compared of a fixture.
OUTPUTS = ("logits", "embedding", "tokens", "feature_map", "image_embedding")
INPUTS = ("pixel_values", "token_ids", "latent", "noise", "input_res")
# Memory may grow by this share during the soak, after its first third.
FLAT = 0.02


def ceiling(options: Options) -> Rows:
    """Forward only: images per second of one pass after another, with inputs on the device."""
    for network, precision, engine in _combinations(options):
        row = {"network": network, "precision": precision, "engine": engine}
        try:
            trunk = load_trunk(options, network, engine, precision)
        except ModelsError as error:
            yield {**row, "refused": str(error)}
            continue
        report = trunk.engine.report()
        for batch in options.batches:
            pixels = _pixels(trunk, batch).to(options.device)
            rate = _rate(options, partial(trunk.forward, pixels), batch)
            yield {**row, "ran": report.name, "batch": batch, "images_per_s": rate,
                   "reason": report.reason}  # fmt: skip


def tensor_in(options: Options) -> Rows:
    """Served in process: normalised tensors in, the best classes out."""
    for network, engine in _served_networks(options):

        def inputs(trunk: Trunk) -> list[Any]:
            size = trunk.preprocess.input_size
            chance = np.random.default_rng(0)
            return [chance.standard_normal((3, *size), dtype=np.float32) for _ in range(8)]

        yield from _serve(options, network, engine, inputs)


def jpeg_in(options: Options) -> Rows:
    """Served in process: JPEG files in, by each way of decoding; and decoding alone."""
    photos = jpegs()
    for network, engine in _served_networks(options):
        for where in ("threads", "auto"):
            rows = _serve(options, network, engine, lambda _: photos, decoders=where)
            yield from ({**row, "decoders": where} for row in rows)
    yield from _decoding(options, photos)


def lone(options: Options) -> Rows:
    """One request at a time, against the bare pass of one image."""

    async def measure(network: str, engine: str) -> Row:
        async with served(options, network, engine, _precision(options)) as server:
            trunk = server.trunk
            pixels = _pixels(trunk, 1).to(options.device)
            item = np.zeros((3, *trunk.preprocess.input_size), np.float32)
            calls = [Call(network, None)]
            await server.run([item], [calls], 1, options.seconds / 4)
            bare = _durations(options, lambda: trunk.forward(pixels))
            _, latencies = await server.run([item], [calls], 1, options.seconds)
            asked, passed = statistics.median(latencies) * 1e3, statistics.median(bare) * 1e3
            return {"network": network, "engine": engine, "p50_ms": asked, "bare_ms": passed,
                    "over_ms": asked - passed, "holds": asked - passed <= 1.5}  # fmt: skip

    for network, engine in _served_networks(options):
        yield asyncio.run(measure(network, engine))


def mixed(options: Options) -> Rows:
    """Two tasks of one trunk at a time, in the same batches."""
    for network, engine in _served_networks(options):
        calls = [[Call(network, None)], [Call(f"{network}-embed", None)]]
        yield from _serve(options, network, engine, lambda _: jpegs(), calls=calls)


def heads(options: Options) -> Rows:
    """VQT heads on one trunk: each image is for one of them, drawn at random."""
    for network in options.networks:
        for engine in options.engines:
            try:
                trunk = load_trunk(options, network, engine, _precision(options))
            except ModelsError as error:
                yield {"network": network, "engine": engine, "refused": str(error)}
                continue
            if trunk.blocks:
                yield from _heads(options, network, engine, trunk)


def fixtures(options: Options) -> Rows:
    """The authors' own outputs (`shared/goldens`, `goldens2`) on this device, by precision."""
    folders = sorted(path.parent for path in options.shared.glob("goldens*/*/meta.json"))
    if not folders:
        yield {"refused": f"no fixtures in {options.shared}"}
    engines = ("eager", "cuda-graph") if options.is_gpu else ("eager",)
    for folder in folders[::12] if options.quick else folders:
        for precision in TOLERANCES if options.is_gpu else ("float32", "bfloat16"):
            tolerance = TOLERANCES[precision]
            for engine in engines:
                row = {"fixture": folder.name, "precision": precision, "engine": engine}
                try:
                    worst = _fixture_error(options, folder, precision, engine)
                except Exception as error:  # one that fails is a row of its own
                    yield {**row, "failed": f"{type(error).__name__}: {error}"[:300]}
                    continue
                if worst is not None:
                    yield {**row, "error": worst, "holds": worst <= tolerance}


def waiting(options: Options) -> Rows:
    """Whether a pass waits for the device, by CUDA's own account."""
    if not options.is_gpu:
        yield {"refused": "only CUDA can tell; tests/models/test_no_waiting.py looks at the code"}
        return
    for network, precision, engine in _combinations(options):
        try:
            trunk = load_trunk(options, network, engine, precision)
        except ModelsError:
            continue
        batch = _pixels(trunk, 4).pin_memory()
        calls = [[_classifier(trunk)] for _ in range(4)]
        start_pass(trunk, batch, calls)  # builds
        row = {"network": network, "precision": precision, "engine": engine}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with compute_stream(options.device).use():
                start_pass(trunk, batch.to(options.device, non_blocking=True), calls)
            yield {**row, "holds": True}
        except RuntimeError as error:
            yield {**row, "holds": False, "reason": str(error)[:300]}
        finally:
            torch.cuda.set_sync_debug_mode("default")


def recovery(options: Options) -> Rows:
    """Whether batches shrink when other memory is taken, and grow again once it is free."""
    if not options.is_gpu:
        yield {"refused": "needs a GPU; tests/service/test_device_loss.py has the policy"}
        return

    async def measure(network: str) -> Row:
        async with served(options, network, "eager", "float32") as server:
            queue = server.backend.batcher._scheduler.queues[network]
            item = np.zeros((3, *server.trunk.preprocess.input_size), np.float32)
            calls = [Call(network, None)]
            torch.cuda.empty_cache()
            before = queue.limit.value
            free, _ = torch.cuda.mem_get_info()
            taken = torch.empty(max(0, free - 2**28), dtype=torch.uint8, device=options.device)
            await server.run([item], [calls], options.clients, options.seconds)
            shrunk = queue.limit.value
            del taken
            torch.cuda.empty_cache()
            await server.run([item], [calls], options.clients, 10 * options.seconds)
            return {"network": network, "shrunk_to": shrunk, "grown_to": queue.limit.value,
                    "holds": shrunk < before and shrunk < queue.limit.value}  # fmt: skip

    yield asyncio.run(measure(options.networks[0]))


def soak(options: Options) -> Rows:
    """Minutes of load: whether memory stays flat after the first third."""

    async def measure(network: str, engine: str) -> Row:
        async with served(options, network, engine, _precision(options)) as server:
            samples: list[tuple[int, int]] = []

            async def sample() -> None:
                while True:
                    await asyncio.sleep(options.seconds / 20)
                    samples.append((_resident(), _device_bytes(options)))

            sampling = asyncio.create_task(sample())
            calls = [[Call(network, None)], [Call(f"{network}-embed", None)]]
            seconds = options.seconds * (5 if options.quick else 100)
            rate, _ = await server.run(jpegs(), calls, options.clients, seconds)
            sampling.cancel()
        third = max(1, len(samples) // 3)
        growth = {}
        for number, name in enumerate(("resident", "device")):
            values = [each[number] for each in samples]
            middle, last = (statistics.mean(values[a:b] or [0]) for a, b in
                            ((third, 2 * third), (2 * third, None)))  # fmt: skip
            growth[f"{name}_growth"] = (last - middle) / middle if middle else 0.0
        flat = all(value <= FLAT for value in growth.values())
        return {"network": network, "engine": engine, "images_per_s": rate, **growth, "holds": flat}

    yield asyncio.run(measure(options.networks[0], options.engines[0]))


# By name, in the order in which they run: `tensor-in` and `jpeg-in` compare with the ceiling.
PARTS: dict[str, Callable[[Options], Rows]] = {
    "waiting": waiting,
    "fixtures": fixtures,
    "ceiling": ceiling,
    "tensor-in": tensor_in,
    "jpeg-in": jpeg_in,
    "lone": lone,
    "mixed": mixed,
    "heads": heads,
    "recovery": recovery,
    "soak": soak,
}
# Parts that run for one network at a time, so that each ends within minutes.
BY_NETWORK = ("waiting", "ceiling", "tensor-in", "jpeg-in", "lone", "mixed", "heads")


def _combinations(options: Options) -> Iterator[tuple[str, str, str]]:
    for network in options.networks:
        for precision in options.precisions:
            for engine in options.engines:
                yield network, precision, engine


def _served_networks(options: Options) -> Iterator[tuple[str, str]]:
    """Networks with the engines that can run them."""
    for network in options.networks:
        for engine in options.engines:
            with contextlib.suppress(ModelsError):
                engine_class(engine).place(Placement(device=options.device))
                yield network, engine


def _precision(options: Options) -> str:
    """What is served: the first of the precisions."""
    return options.precisions[0]


def _pixels(trunk: Trunk, batch: int) -> torch.Tensor:
    return trunk.collate([trunk.blank() for _ in range(batch)])


def _classifier(trunk: Trunk) -> HeadCall:
    return HeadCall(create_head("classify", trunk, [str(n) for n in range(trunk.num_classes)]))


@torch.inference_mode()
def _rate(options: Options, run: Callable[[], object], batch: int) -> float:
    """Images per second, with the device never waiting for the host."""
    for _ in range(3):
        run()
    options.wait()
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        run()
        passes += 1
        if passes % 8 == 0:
            options.wait()  # else seconds of work would be queued
    options.wait()
    return passes * batch / (time.perf_counter() - started)


@torch.inference_mode()
def _durations(options: Options, run: Callable[[], object]) -> list[float]:
    """Seconds of single runs, each until the device has done it."""
    durations: list[float] = []
    end = time.perf_counter() + options.seconds
    while not durations or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        options.wait()
        durations.append(time.perf_counter() - started)
    return durations


def _serve(
    options: Options, network: str, engine: str, inputs: Callable[[Trunk], list[Any]],
    calls: list[list[Call]] | None = None, **more: Any,
) -> Rows:  # fmt: skip
    precision = _precision(options)

    async def measure() -> Row:
        async with served(options, network, engine, precision, **more) as server:
            items = inputs(server.trunk)
            own = calls or [[Call(network, None)]]
            await server.run(items, own, options.clients, options.seconds / 2)
            before = time.process_time()
            rate, latencies = await server.run(items, own, options.clients, options.seconds)
            cpu_s = time.process_time() - before
            busy = await _busy_share(options, server, items, own)
            return {
                "images_per_s": rate,
                "share_of_ceiling": _share(options, network, engine, precision, rate),
                "p50_ms": percentile(latencies, 0.5) * 1e3,
                "p99_ms": percentile(latencies, 0.99) * 1e3,
                "cpu_ms_per_image": cpu_s / max(1, len(latencies)) * 1e3,
                "gpu_busy": busy,
            }

    row = {"network": network, "precision": precision, "engine": engine}
    try:
        yield {**row, **asyncio.run(measure())}
    except ServiceError as error:
        yield {**row, "refused": error.detail}


async def _busy_share(
    options: Options, server: Served, items: list[Any], calls: list[list[Call]]
) -> float | None:
    """The share of the time in which a kernel runs, from a profiler's trace."""
    if not options.is_gpu:
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        await server.run(items, calls, options.clients, min(1.0, options.seconds))
        options.wait()
        span_us = (time.perf_counter() - started) * 1e6
    profiler.export_chrome_trace(str(options.folder / f"trace-{server.network}.json"))
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / span_us


def _share(options: Options, network: str, engine: str, precision: str, rate: float) -> Any:
    """The rate over the best forward-only one of the same network and precision."""
    rates = [
        row["images_per_s"]
        for rows in options.done.values()
        for row in rows
        if "ran" in row and (row["network"], row["precision"]) == (network, precision)
    ]
    return rate / max(rates) if rates else None


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
    from torchvision.io import decode_jpeg

    files = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in photos * 16]
    rate = _rate(options, lambda: decode_jpeg(files, device=options.device), len(files))
    yield {"decoding": "nvJPEG, batches of 64, without a transform", "images_per_s": rate}


def _heads(options: Options, network: str, engine: str, trunk: Trunk) -> Rows:
    counts = (1, 4) if options.quick else (1, 64, 1000)
    calls = [random_head(trunk, seed) for seed in range(max(counts))]
    bench = Bench(trunk, 0, max(options.batches))
    images = 4 * max(options.batches)
    one = 0.0
    for count in counts:
        asked: Requests = [
            ("shared", [random.Random(n).choice(calls[:count])]) for n in range(images)
        ]
        rates = [bench.run(asked) for _ in range(2 if options.quick else 6)][1:]
        rate = statistics.median(rates)
        one = one or rate
        yield {"network": network, "engine": engine, "heads": count, "images_per_s": rate,
               "time_of_one": one / rate, "holds": count != 64 or one / rate <= 1.1}  # fmt: skip


def _fixture_error(options: Options, folder: Path, precision: str, engine: str) -> float | None:
    """The largest error over the largest value of any output; None if it compares nothing."""
    meta = json.loads((folder / "meta.json").read_text())
    golden = load_file(folder / "golden.safetensors")
    placement = engine_class(engine).place(
        Placement(
            device=options.device,
            precision=resolve_precision(precision, options.device),
            engine=engine,
        )
    )
    path = next(iter(sorted(folder.glob("checkpoint.*"))), None)
    inputs = {name: golden[name] for name in INPUTS if name in golden}
    if path is None or not inputs:
        return None
    model = load_checkpoint(path, arguments=meta["hyperparameters"], placement=placement)
    if "pixel_values" in inputs:
        trunk = model.trunk
        pixels = inputs["pixel_values"].to(options.device)
        plan, tensors, _ = trunk.pass_inputs(pixels, LAST_OUTPUT)
        trunk.engine.prepare(plan, tensors)
    if precision == "float32":
        expected, outputs = golden, model.run(**inputs)
    else:  # of the float32 model, which has its own row
        exact = load_checkpoint(path, arguments=meta["hyperparameters"])
        expected, outputs = (_served_outputs(each, inputs) for each in (exact, model))
    errors = [
        float((outputs[name].float() - expected[name]).abs().max() / expected[name].abs().max())
        for name in OUTPUTS
        if name in expected and name in outputs and outputs[name].shape == expected[name].shape
    ]
    return max(errors, default=None)


def _served_outputs(model: Model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What heads answer with, which is all that reduced precisions have."""
    named: dict[str, torch.Tensor] = {}
    for task in ("classify", "embed"):
        if task in model.heads and "pixel_values" in inputs:
            rows = run_rows(model.trunk, inputs["pixel_values"], HeadCall(model.heads[task]))
            named |= {
                key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]
            }
    return named


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _device_bytes(options: Options) -> int:
    return torch.cuda.memory_reserved(options.device) if options.is_gpu else 0
