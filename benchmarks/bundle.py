"""A comparison's results as one JSON file: arguments, machine, and every round's raw numbers."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all measurements of a comparison have in common.

    Args:
        photos: `small`, `medium` or `large`, see `benchmarks/photos.py`.
        images: images in a request.
    """

    transform: str
    precision: str
    photos: str
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One server, or bare loop, under one load in one round.

    Args:
        kind: a closed loop, an open loop, or a bare loop without a server.
        level: connections of a closed loop, percent of the limit of an open loop, or the name of a
            bare loop's arrangement.
        images_per_s: answered images per second.
        offered_per_s: images per second that an open loop sent.
        latencies_ms: of each request that was answered in time to count.
        answered: requests with status 200, also after the end.
        failures: requests without an answer of status 200.
        agreement: share of plain timm's top 5 that the answers name; None for bare loops.
        server_cpu_s: processor time of all the server's processes.
        load_cpu_s: processor time of the load generator.
        other_cores: cores that anything else kept busy.
        resident_bytes: memory of all the server's processes after the load.
    """

    model: str
    server: str
    round: int
    kind: Literal["closed", "open", "bare"]
    level: int | str
    images_per_s: float
    offered_per_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    answered: int = 0
    failures: int = 0
    agreement: float | None = None
    server_cpu_s: float = 0.0
    load_cpu_s: float = 0.0
    other_cores: float = 0.0
    resident_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Bundle:
    """
    Args:
        time: when the comparison started, in ISO 8601.
        arguments: the command line's.
        machine: see `describe_machine`.
        rivals: the pinned packages of each rival that was measured.
        min_agreement: answers that agree less are invalid.
        errors: servers that did not start, with the reason.
    """

    time: str
    arguments: dict[str, Any]
    machine: dict[str, object]
    rivals: dict[str, list[str]]
    setting: Setting
    min_agreement: float
    measurements: list[Measurement] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the bundle. Its folder is created if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a bundle.

        Raises:
            ValueError: a file of another kind or format.
        """
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a bundle of format {FORMAT}")
        setting = Setting(**fields.pop("setting"))
        measurements = [Measurement(**row) for row in fields.pop("measurements")]
        return cls(setting=setting, measurements=measurements, **fields)
