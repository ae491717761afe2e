"""What each model has done since this process started, as Triton's statistics extension counts it.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from service.types import InferResult, Timing


@dataclass(slots=True)
class Duration:
    """A number of events, and their seconds together."""

    count: float = 0
    seconds: float = 0

    def add(self, seconds: float, count: float = 1) -> None:
        self.count += count
        self.seconds += max(seconds, 0)

    def to_json(self) -> dict[str, int]:
        return {"count": round(self.count), "ns": round(self.seconds * 1e9)}


@dataclass(slots=True)
class ModelStatistics:
    """Requests that named one model. A request's stages are those of its slowest image."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    # what is left of the request
    compute_output: Duration = field(default_factory=Duration)
    images: int = 0
    # Passes, by their images; one that other models shared counts as the part with these images.
    passes: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))
    last_ms: int = 0

    def add(self, elapsed_s: float, result: InferResult | None, *, ok: bool) -> None:
        """Count a request."""
        if not ok:
            self.fail.add(elapsed_s)
            return
        self.success.add(elapsed_s)
        self.last_ms = int(time.time() * 1e3)
        timings = [image.timing for image in result.images if image.timing] if result else []
        self.images += len(timings)
        for timing in timings:
            share = 1 / max(timing.batch_size, 1)
            self.passes[timing.batch_size].add(share * timing.compute_ms / 1e3, share)
        stages = [
            _slowest(timings, lambda timing: timing.decode_ms),
            _slowest(timings, lambda timing: timing.queue_ms),
            _slowest(timings, lambda timing: timing.compute_ms),
        ]
        durations = (self.compute_input, self.queue, self.compute_infer)
        for duration, seconds in zip(durations, stages, strict=True):
            duration.add(seconds)
        self.compute_output.add(elapsed_s - sum(stages))

    def to_json(self) -> dict[str, Any]:
        """An entry of `model_stats`, without name and version. Nothing is cached."""
        nothing = Duration().to_json()
        return {
            "last_inference": self.last_ms,
            "inference_count": self.images,
            "execution_count": round(sum(passes.count for passes in self.passes.values())),
            "inference_stats": {
                "success": self.success.to_json(),
                "fail": self.fail.to_json(),
                "queue": self.queue.to_json(),
                "compute_input": self.compute_input.to_json(),
                "compute_infer": self.compute_infer.to_json(),
                "compute_output": self.compute_output.to_json(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {"batch_size": size, "compute_input": nothing,
                 "compute_infer": passes.to_json(), "compute_output": nothing}
                for size, passes in sorted(self.passes.items())
            ],
        }  # fmt: skip


def _slowest(timings: list[Timing], stage: Callable[[Timing], float]) -> float:
    """Seconds."""
    return max(map(stage, timings), default=0.0) / 1e3
