"""Every counter and histogram, declared once, on a registry that is passed in.

Label values are bounded: models and trunks of the catalog, tasks, and the constants below. Models
that are not in the catalog are counted as `unknown`.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics import exposition as openmetrics

from service import tracing
from service.statistics import ModelStatistics
from service.triton_metrics import WithTritonNames

# Each counter and histogram would have a second series with the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call]

OUTCOMES = ("ok", "invalid", "rejected", "timeout", "cancelled", "error")
STAGES = ("decode", "queue", "compute", "postprocess")
DROP_REASONS = ("expired", "cancelled")
REFUSAL_REASONS = ("full", "late")
DEATH_REASONS = ("time", "hung", "crash")

# Most models with series of their own, some 60 each. There may be a hundred thousand heads.
MAX_MODELS = 1000

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1,
    0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128)


class Metrics:
    """Metrics of requests, counted by gateways, and of images and passes, counted by workers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._labels: set[str] = set()
        # By label, of requests that named one model.
        self.statistics: dict[str, ModelStatistics] = defaultdict(ModelStatistics)
        # When a request was last refused for a full queue, in `time.monotonic` seconds.
        self.queue_full_at = -math.inf
        self.requests = Counter(
            "vitrail_requests",
            "Requests, by outcome.",
            ("task", "model", "outcome"),
            registry=registry,
        )
        self.request_duration = Histogram(
            "vitrail_request_duration_seconds",
            "Seconds from the first byte of a request to the response.",
            ("task", "model", "outcome"),
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "vitrail_images",
            "Images, each counted once for every model that was run on it.",
            ("task", "model", "outcome"),
            registry=registry,
        )
        self.stage_duration = Histogram(
            "vitrail_stage_duration_seconds",
            "Seconds that an image spent in a stage; for compute, those of its whole batch.",
            ("stage", "trunk"),
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "vitrail_batch_size",
            "Images in a trunk pass.",
            ("trunk",),
            buckets=BATCH_SIZES,
            registry=registry,
        )
        self.dropped = Counter(
            "vitrail_queue_dropped_images",
            "Images dropped from the queue before they were computed.",
            ("trunk", "reason"),
            registry=registry,
        )
        self.refused = Counter(
            "vitrail_queue_refused_images",
            "Images refused before they were decoded: places are taken, or they would be late.",
            ("trunk", "reason"),
            registry=registry,
        )
        self.refused_files = Counter(
            "vitrail_device_refused_files",
            "JPEG files that the device did not decode, so that a CPU did or said what is wrong.",
            ("trunk",),
            registry=registry,
        )
        self.decoder_deaths = Counter(
            "vitrail_decoder_deaths",
            "Decoding processes that died and were replaced.",
            ("reason",),
            registry=registry,
        )
        for reason in DEATH_REASONS:
            self.decoder_deaths.labels(reason)
        self.loop_lag = Histogram(
            "vitrail_event_loop_lag_seconds",
            "Seconds by which the event loop of a gateway or worker is late, twice a second.",
            buckets=SECONDS,
            registry=registry,
        )
        self.shed = Counter(
            "vitrail_shed_requests",
            "Requests refused unread, because the event loop of a gateway was behind.",
            registry=registry,
        )
        self.in_flight = Gauge(
            "vitrail_requests_in_flight",
            "Requests that are being received or answered, sampled twice a second.",
            ("protocol",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.bytes_in_flight = Gauge(
            "vitrail_request_bytes_in_flight",
            "Bytes received for them, sampled twice a second.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.label_sets = Counter(
            "vitrail_label_sets",
            "Lookups of label sets' embeddings in the cache.",
            ("result",),
            registry=registry,
        )
        for result in ("hit", "miss"):
            self.label_sets.labels(result)
        self.fits = Counter(
            "vitrail_fits", "Fits of heads, by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("ok", "invalid", "cancelled", "error"):
            self.fits.labels(outcome)
        self.catalog_updates = Counter(
            "vitrail_catalog_updates",
            "Changes of the catalog, by outcome: `error` if a part was rolled back, or if it could "
            "not be read.",
            ("outcome",),
            registry=registry,
        )
        for outcome in ("ok", "error"):
            self.catalog_updates.labels(outcome)
        self.trunk_failures = Counter(
            "vitrail_trunk_failures",
            "Trunk passes that failed, including those that were retried in smaller batches.",
            ("trunk",),
            registry=registry,
        )

    def add_model(self, model: str, trunk: str, tasks: tuple[str, ...]) -> None:
        """Create a model's series at zero, so that rates exist before its first request."""
        label = self.label(model) if tasks else ""
        for task in tasks:
            for outcome in OUTCOMES:
                self.requests.labels(task, label, outcome)
                self.images.labels(task, label, outcome)
            self.request_duration.labels(task, label, "ok")
        for stage in STAGES:
            self.stage_duration.labels(stage, trunk)
        for reason in DROP_REASONS:
            self.dropped.labels(trunk, reason)
        for reason in REFUSAL_REASONS:
            self.refused.labels(trunk, reason)
        self.batch_size.labels(trunk)
        self.refused_files.labels(trunk)
        self.trunk_failures.labels(trunk)

    def prune(self, known: Callable[[str], bool]) -> None:
        """Remove the series of models that are gone, such as deleted heads.

        Not where several processes share their metrics: their files keep every series. The number
        of models that get a label of their own is bounded there.
        """
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            return
        gone = {name for name in self._labels if not known(name)}
        self._labels -= gone
        for name in gone:
            self.statistics.pop(name, None)
            for metric in (self.requests, self.request_duration, self.images):
                metric.remove_by_labels({"model": name})

    def label(self, model: str) -> str:
        """The label of a model of the catalog: its name, or `other` beyond MAX_MODELS names."""
        if model not in self._labels and len(self._labels) >= MAX_MODELS:
            return "other"
        self._labels.add(model)
        return model


def exposition(
    registry: CollectorRegistry, accept: str = "", *, triton: bool = False
) -> tuple[bytes, str]:
    """The metrics of this process, or of all processes that share PROMETHEUS_MULTIPROC_DIR.

    They are in Prometheus' text format. Where traces are on they are in OpenMetrics' if that is
    accepted, since only that has exemplars.

    Args:
        accept: the `Accept` header.
        triton: also under Triton's names, which OpenMetrics would change.

    Returns:
        The metrics, and their media type.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    if triton:
        return generate_latest(WithTritonNames(registry)), CONTENT_TYPE_LATEST
    if tracing.is_on() and "application/openmetrics-text" in accept:
        content: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return content, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_LATEST
