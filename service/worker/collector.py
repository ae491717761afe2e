"""Gauges of the worker's state, read when Prometheus scrapes."""

import asyncio
import logging
from collections.abc import Iterator

import torch
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from models.description import State
from models.errors import ModelNotFoundError
from service.metrics import MAX_MODELS
from service.worker.backend import LocalBackend

logger = logging.getLogger(__name__)


class BackendCollector(Collector):
    """Reads a backend's queues, models and GPU memory."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        yield from self._queues()
        yield from self._models()
        if self._backend.registry.device.type == "cuda":
            yield from self._gpu()

    def _queues(self) -> Iterator[Metric]:
        batcher = self._backend.batcher
        up = GaugeMetricFamily("vitrail_worker_up", "1 while the worker can compute.")
        up.add_metric((), float(self._backend.health().live))
        yield up
        depth = GaugeMetricFamily(
            "vitrail_queue_depth", "Images admitted but not yet running.", labels=("trunk",)
        )
        for trunk, count in batcher.depth().items():
            depth.add_metric((trunk,), count)
        yield depth
        undecoded = GaugeMetricFamily(
            "vitrail_decode_queue_depth", "Inputs that wait to be decoded."
        )
        undecoded.add_metric((), self._backend.undecoded())
        yield undecoded
        seconds = GaugeMetricFamily(
            "vitrail_queue_seconds", "Estimated seconds to compute all admitted images."
        )
        seconds.add_metric((), batcher.queue_seconds())
        yield seconds
        running = GaugeMetricFamily("vitrail_inflight_batches", "Batches on the device.")
        running.add_metric((), batcher.in_flight())
        yield running

    def _models(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "vitrail_model_state",
            "1 for the state a model is in, for the first 1000 models.",
            labels=("model", "state"),
        )
        memory = GaugeMetricFamily(
            "vitrail_model_memory_bytes",
            "Bytes of a loaded model's weights, which models on one trunk share.",
            labels=("model", "trunk"),
        )
        load = GaugeMetricFamily(
            "vitrail_model_load_duration_seconds",
            "Duration of the last load, including the warm-up.",
            labels=("model",),
        )
        registry = self._backend.registry
        models = GaugeMetricFamily("vitrail_models", "Models by state.", labels=("state",))
        states = registry.states()
        for each in State:  # also those of none, so that alerts have data
            models.add_metric((each,), states.get(each, 0))
        for name in registry.names(0, MAX_MODELS):
            try:
                model = registry.describe(name)
            except ModelNotFoundError:  # removed meanwhile
                continue
            for possible in State:
                state.add_metric((name, possible), float(model.state == possible))
            if model.memory_bytes is not None and model.load_seconds is not None:
                memory.add_metric((name, model.trunk), model.memory_bytes)
                load.add_metric((name,), model.load_seconds)
        failures = GaugeMetricFamily(
            "vitrail_catalog_failures",
            "Models that are not as the catalog says, because that did not load; 1 more if the "
            "catalog cannot be read.",
        )
        watch = self._backend.watch
        failures.add_metric((), len(watch.failures) + bool(watch.error))
        yield from (models, state, memory, load, failures)

    def _gpu(self) -> Iterator[Metric]:
        device = self._backend.registry.device
        memory = GaugeMetricFamily(
            "vitrail_gpu_memory_bytes",
            "GPU memory: `total`, `used` by all processes, and of this one's torch `allocated` to "
            "tensors, its `peak`, and `reserved` with what it keeps for later tensors.",
            labels=("kind",),
        )
        free, total = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats(device)
        memory.add_metric(("total",), total)
        memory.add_metric(("used",), total - free)
        memory.add_metric(("allocated",), stats.get("allocated_bytes.all.current", 0))
        memory.add_metric(("peak",), stats.get("allocated_bytes.all.peak", 0))
        memory.add_metric(("reserved",), stats.get("reserved_bytes.all.current", 0))
        yield memory
        events = GaugeMetricFamily(
            "vitrail_gpu_allocator_events",
            "How often torch's allocator freed its cache to find memory (`retries`), and found "
            "none (`ooms`), since the process started.",
            labels=("kind",),
        )
        events.add_metric(("retries",), stats.get("num_alloc_retries", 0))
        events.add_metric(("ooms",), stats.get("num_ooms", 0))
        yield events


SHARE_INTERVAL_S = 1.0


async def share_gauges(collector: Collector) -> None:
    """Copy a collector's gauges to plain ones once a second, until cancelled.

    Processes that share PROMETHEUS_MULTIPROC_DIR see each other's plain gauges, but not each
    other's collectors. The gateway's `/metrics` adds the workers' gauges up.
    """
    shared = SharedGauges()
    while True:
        try:
            shared.update(collector)
        except Exception:  # the next round tries again
            logger.exception("sharing gauges failed")
        await asyncio.sleep(SHARE_INTERVAL_S)


class SharedGauges:
    """Plain gauges with the values of a collector's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._set: dict[tuple[str, tuple[str, ...]], Gauge] = {}

    def update(self, collector: Collector) -> None:
        """Copy the values. Those that the collector no longer has become 0, since such gauges
        cannot be removed."""
        gone = dict(self._set)
        for metric in collector.collect():
            for sample in metric.samples:
                if metric.name not in self._gauges:
                    self._gauges[metric.name] = Gauge(
                        metric.name,
                        metric.documentation,
                        tuple(sample.labels),
                        registry=self._registry,
                        multiprocess_mode="livesum",
                    )
                gauge = self._gauges[metric.name]
                child = gauge.labels(**sample.labels) if sample.labels else gauge
                child.set(sample.value)
                place = metric.name, tuple(sample.labels.values())
                self._set[place] = child
                gone.pop(place, None)
        for place, child in gone.items():
            child.set(0)
            del self._set[place]
