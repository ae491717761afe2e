"""Triton's names for metrics that exist under ours, for dashboards that were made for Triton.

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md. Requests and
images have the model's name as `model`. Passes are shared by models, so that time in the queue and
in passes has the trunk's name instead.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ("model", "version")
VERSION = "1"

# name: (what it is, our sample, the labels that a sample must have, the label that names the
# model, and the factor). A value of None takes all others than `ok`.
COUNTERS: dict[str, tuple[str, str, dict[str, str | None], str, float]] = {
    "nv_inference_request_success": (
        "Requests that were answered.",
        "vitrail_requests_total", {"outcome": "ok"}, "model", 1,
    ),
    "nv_inference_request_failure": (
        "Requests that failed.",
        "vitrail_requests_total", {"outcome": None}, "model", 1,
    ),
    "nv_inference_request_duration_us": (
        "Microseconds of answered requests.",
        "vitrail_request_duration_seconds_sum", {"outcome": "ok"}, "model", 1e6,
    ),
    "nv_inference_count": (
        "Images.",
        "vitrail_images_total", {"outcome": "ok"}, "model", 1,
    ),
    "nv_inference_exec_count": (
        "Passes, by trunk.",
        "vitrail_batch_size_count", {}, "trunk", 1,
    ),
    "nv_inference_queue_duration_us": (
        "Microseconds that images waited, by trunk.",
        "vitrail_stage_duration_seconds_sum", {"stage": "queue"}, "trunk", 1e6,
    ),
    "nv_inference_compute_input_duration_us": (
        "Microseconds of decoding and transforming images, by trunk.",
        "vitrail_stage_duration_seconds_sum", {"stage": "decode"}, "trunk", 1e6,
    ),
    "nv_inference_compute_infer_duration_us": (
        "Microseconds of the images' passes, by trunk.",
        "vitrail_stage_duration_seconds_sum", {"stage": "compute"}, "trunk", 1e6,
    ),
    "nv_inference_compute_output_duration_us": (
        "Microseconds of finishing outputs, by trunk.",
        "vitrail_stage_duration_seconds_sum", {"stage": "postprocess"}, "trunk", 1e6,
    ),
}  # fmt: skip


class WithTritonNames(CollectorRegistry):
    """A registry's metrics, followed by the same under Triton's names."""

    def __init__(self, source: Collector) -> None:
        super().__init__()
        self._source = source

    def collect(self) -> Iterator[Metric]:
        metrics = list(self._source.collect())
        yield from metrics
        yield from triton_metrics(metrics)


def triton_metrics(metrics: Iterable[Metric]) -> Iterator[Metric]:
    """Metrics under Triton's names; those without samples are left out."""
    by_name = defaultdict(list)
    for metric in metrics:
        for sample in metric.samples:
            by_name[sample.name].append(sample)
    for name, (text, ours, required, label, factor) in COUNTERS.items():
        totals: dict[str, float] = defaultdict(float)
        for sample in by_name[ours]:
            if all(_matches(sample.labels[key], value) for key, value in required.items()):
                totals[sample.labels[label]] += factor * sample.value
        if totals:
            family = CounterMetricFamily(name, text, labels=LABELS)
            for model, value in totals.items():
                family.add_metric((model, VERSION), value)
            yield _named(family, name)


def _matches(label: str, wanted: str | None) -> bool:
    return label != "ok" if wanted is None else label == wanted


def _named(family: CounterMetricFamily, name: str) -> Metric:
    """The counter under its very name: Triton's have no `_total`, which the library appends."""
    metric = Metric(name, family.documentation, "unknown")
    for sample in family.samples:
        metric.samples.append(sample._replace(name=name))
    return metric
