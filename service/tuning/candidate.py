"""A candidate: settings of a trunk and of the process, and what was measured with them."""

from dataclasses import dataclass, replace
from typing import Any

from models.catalog import Catalog, TrunkEntry
from models.trunks.devices import Precision
from models.trunks.engines.report import Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings that a model can be served with."""

    engine: str
    precision: Precision
    transform: str
    # Batches that run at the same time: a setting of the process, not of the catalog.
    streams: int
    max_batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.engine}, {self.precision}, {self.transform} transform, "
            f"{self.streams} streams, batches of {self.max_batch_size}"
        )

    def trunk_settings(self, calibration: str | None) -> dict[str, Any]:
        """The keys of the trunk's table in a catalog."""
        settings = {
            "engine": self.engine,
            "precision": self.precision,
            "transform": self.transform,
            "max_batch_size": self.max_batch_size,
        }
        if self.precision == "int8" and calibration is not None:
            settings["calibration"] = calibration
        return settings

    def apply(self, catalog: Catalog, model: str, calibration: str | None) -> Catalog:
        """The catalog with these settings for the model's trunk, and without other models."""
        entry = catalog.models[model]
        trunk: TrunkEntry = replace(
            catalog.trunks[entry.trunk], **self.trunk_settings(calibration), tolerance=None
        )
        return replace(
            catalog,
            models={model: entry},
            trunks={**catalog.trunks, entry.trunk: trunk},
            defaults={},
            startup=(),
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a candidate achieves. Rates and times are medians."""

    candidate: Candidate
    images_per_s: float
    # Of a request that is alone on the machine.
    lone_ms: float
    # With eager float32 and the exact transform; None for that itself.
    agreement: Agreement | None

    @property
    def error(self) -> float:
        """The largest error over the largest value."""
        return 0.0 if self.agreement is None else self.agreement.largest_error


@dataclass(frozen=True, slots=True)
class Skipped:
    """A candidate that was not measured, and why."""

    candidate: Candidate
    reason: str
