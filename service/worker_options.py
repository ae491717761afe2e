"""A worker's settings, and the defaults that depend on the machine."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from models.inputs.images import ImageLimits

# Beyond these, lanes wait for Python's lock more than for each other; more workers scale further.
MAX_CPU_STREAMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """A worker's settings, documented in `service/settings.py`. 0 is a default that depends on
    the machine."""

    startup: tuple[str, ...] = ()
    threads: int = 0
    streams: int = 0
    decode_threads: int = 0
    decoders: str = "auto"
    decode_cpu_s: float = 5.0
    max_batch_size: int = 0
    max_queue_size: int = 256
    max_queue_delay_ms: float = 0.0
    max_bytes_in_flight: int = 512 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 50_000_000
    max_image_side: int = 16_384
    probe_interval_s: float = 30.0
    stuck_after_s: float = 60.0
    label_cache_bytes: int = 256 * 2**20
    heads_folder: str = ""
    catalog_poll_s: float = 0.0
    model_memory_mb: int = 0

    @property
    def lane_threads(self) -> int:
        """The threads of one lane: an equal share of all."""
        return max(1, self.threads // self.streams)

    @property
    def image_limits(self) -> ImageLimits:
        """The limits of decoders."""
        return ImageLimits(
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            max_side=self.max_image_side,
        )

    def resolve(self, device_type: str) -> "WorkerOptions":
        """The options with defaults instead of 0.

        On a CPU a batch runs on each core: threads that share a pass wait for each other, and while
        images are decoded one of them is often displaced. A single image that finds the cores idle
        still takes them all. On a GPU there are two streams, so that one batch is copied while
        another computes.
        """
        cores = usable_cores()
        threads = self.threads or cores
        cpu = device_type == "cpu"
        return replace(
            self,
            threads=threads,
            streams=self.streams or (min(threads, MAX_CPU_STREAMS) if cpu else 2),
            decode_threads=self.decode_threads or max(2, cores),
            max_batch_size=self.max_batch_size or (16 if cpu else 64),
        )


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
