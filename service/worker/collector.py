"""What is true of the worker right now, read when Prometheus asks."""

import asyncio
from collections.abc import Iterator

import torch
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from models.registry import State
from service.worker.backend import Engine


class EngineCollector(Collector):
    """Gauges of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self._queues()
        yield from self._models()
        if torch.cuda.is_available():
            yield from self._gpu()

    def _queues(self) -> Iterator[Metric]:
        batcher = self._engine.batcher
        up = GaugeMetricFamily("vitrail_worker_up", "1 while the worker can compute.")
        up.add_metric((), float(self._engine.health().live))
        yield up
        depth = GaugeMetricFamily(
            "vitrail_queue_depth", "Images admitted and not yet running.", labels=("trunk",)
        )
        for trunk, count in batcher.depth().items():
            depth.add_metric((trunk,), count)
        yield depth
        seconds = GaugeMetricFamily(
            "vitrail_queue_seconds", "Estimated seconds to compute all that is admitted."
        )
        seconds.add_metric((), batcher.queue_seconds())
        yield seconds
        running = GaugeMetricFamily("vitrail_inflight_batches", "Batches on the device.")
        running.add_metric((), batcher.in_flight())
        yield running

    def _models(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "vitrail_model_state", "1 for the state a model is in.", labels=("model", "state")
        )
        memory = GaugeMetricFamily(
            "vitrail_model_memory_bytes",
            "Weights of a loaded model; models on one trunk share its weights.",
            labels=("model", "trunk"),
        )
        load = GaugeMetricFamily(
            "vitrail_model_load_duration_seconds",
            "How long the last load took, warm-up included.",
            labels=("model",),
        )
        for name in self._engine.registry.catalog.models:
            described = self._engine.registry.describe(name)
            for possible in State:
                state.add_metric((name, possible), float(described["state"] == possible))
            if "memory_bytes" in described:
                memory.add_metric((name, described["trunk"]), described["memory_bytes"])
                load.add_metric((name,), described["load_seconds"])
        yield from (state, memory, load)

    def _gpu(self) -> Iterator[Metric]:
        gpu = GaugeMetricFamily(
            "vitrail_gpu_memory_bytes", "GPU memory held by torch.", labels=("kind",)
        )
        device = self._engine.registry.device
        gpu.add_metric(("allocated",), torch.cuda.memory_allocated(device))
        gpu.add_metric(("reserved",), torch.cuda.memory_reserved(device))
        yield gpu


SHARE_INTERVAL_S = 1.0


async def share_gauges(collector: Collector) -> None:
    """Copy a collector's gauges, once a second, to where the gateway's `/metrics` sums them up.

    Collectors run only in their own process; processes that share PROMETHEUS_MULTIPROC_DIR see
    each other's plain gauges.
    """
    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}
    while True:
        for metric in collector.collect():
            for sample in metric.samples:
                if metric.name not in gauges:
                    gauges[metric.name] = Gauge(
                        metric.name,
                        metric.documentation,
                        tuple(sample.labels),
                        registry=registry,
                        multiprocess_mode="livesum",
                    )
                gauge = gauges[metric.name]
                child = gauge.labels(**sample.labels) if sample.labels else gauge
                child.set(sample.value)
        await asyncio.sleep(SHARE_INTERVAL_S)
