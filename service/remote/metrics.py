"""A gateway's metrics of its workers."""

import math
import os

from prometheus_client import CollectorRegistry, Counter, Gauge


class RemoteMetrics:
    """Labelled with the worker's address, and added up over a gateway's processes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge(
            "vitrail_gateway_worker_up",
            "1 while the gateway reaches the worker; the minimum over the gateway's processes.",
            ("worker",),
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.outstanding = Gauge(
            "vitrail_gateway_worker_outstanding_images",
            "Images sent to the worker and not yet answered.",
            ("worker",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.retries = Counter(
            "vitrail_gateway_retries",
            "Requests sent to another worker because this one was lost.",
            ("worker",),
            registry=registry,
        )

    def add_worker(self, address: str) -> None:
        """Create a worker's metrics at zero."""
        self.up.labels(address).set(0)
        self.outstanding.labels(address).set(0)
        self.retries.labels(address)

    def remove_worker(self, address: str) -> None:
        """Remove the gauges of a worker that discovery no longer finds."""
        self.outstanding.labels(address).set(0)
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # labels cannot be removed there
            self.up.labels(address).set(math.nan)
        else:
            self.up.remove(address)
            self.outstanding.remove(address)
