"""Triton's names for metrics that exist under ours, for dashboards that were made for Triton.

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md. Requests and
images have the model's name as `model`. Passes are shared by models, so that time in the queue and
in passes has the trunk's name instead.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

VERSION = "1"
MICROSECONDS = 1e6


class Source(NamedTuple):
    """What one of Triton's metrics is made of: a text, and the sum of samples of ours.

    Args:
        label: our label that becomes `model`.
        keeps: which samples are summed, by their labels.
        factor: from our unit to Triton's.
    """

    text: str
    sample: str
    label: str
    keeps: Callable[[Mapping[str, str]], bool] = lambda _: True
    factor: float = 1


def _is_ok(labels: Mapping[str, str]) -> bool:
    return labels["outcome"] == "ok"


def _stage(text: str, stage: str) -> Source:
    sample = "vitrail_stage_duration_seconds_sum"
    return Source(text, sample, "trunk", lambda labels: labels["stage"] == stage, MICROSECONDS)


SOURCES = {
    "nv_inference_request_success": Source(
        "Requests that were answered.", "vitrail_requests_total", "model", _is_ok
    ),
    "nv_inference_request_failure": Source(
        "Requests that failed.",
        "vitrail_requests_total",
        "model",
        lambda labels: not _is_ok(labels),
    ),
    "nv_inference_request_duration_us": Source(
        "Microseconds of answered requests.",
        "vitrail_request_duration_seconds_sum",
        "model",
        _is_ok,
        MICROSECONDS,
    ),
    "nv_inference_count": Source("Images.", "vitrail_images_total", "model", _is_ok),
    "nv_inference_exec_count": Source("Passes, by trunk.", "vitrail_batch_size_count", "trunk"),
    "nv_inference_queue_duration_us": _stage("Microseconds that images waited, by trunk.", "queue"),
    "nv_inference_compute_input_duration_us": _stage(
        "Microseconds of decoding and transforming images, by trunk.", "decode"
    ),
    "nv_inference_compute_infer_duration_us": _stage(
        "Microseconds of the images' passes, by trunk.", "compute"
    ),
    "nv_inference_compute_output_duration_us": _stage(
        "Microseconds of finishing outputs, by trunk.", "postprocess"
    ),
}


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
    """Metrics under Triton's names; those without samples are left out.

    Their type is unknown, because the library appends `_total` to the names of counters.
    """
    by_name = defaultdict(list)
    for metric in metrics:
        for sample in metric.samples:
            by_name[sample.name].append(sample)
    for name, source in SOURCES.items():
        totals: dict[str, float] = defaultdict(float)
        for sample in by_name[source.sample]:
            if source.keeps(sample.labels):
                totals[sample.labels[source.label]] += source.factor * sample.value
        made = Metric(name, source.text, "unknown")
        for model, value in totals.items():
            made.add_sample(name, {"model": model, "version": VERSION}, value)
        if made.samples:
            yield made
