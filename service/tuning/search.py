"""A search for the fastest settings, in stages: each varies one thing of the best so far.

The candidates of a stage are measured in turns, since the machine's speed drifts.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from models.catalog import Catalog
from models.errors import ModelsError
from models.trunks.devices import Placement, resolve_device
from models.trunks.engines.registry import engine_class, engine_classes
from service.errors import ServiceError
from service.tuning.candidate import Candidate, Measurement, Skipped
from service.tuning.served import Served
from service.worker_options import WorkerOptions, usable_cores

ROUNDS = 3
# A round of one candidate takes this share of the whole time.
ROUND_SHARE = 1 / 60
LONE_REQUESTS = 5
# A smaller gain than this is within the noise of a busy machine.
MIN_GAIN = 1.03
CAPS = (4, 16, 32)
SLOW_ON_CPUS = ("compile",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What to tune, and how long."""

    catalog: Catalog
    model: str
    device: str
    seconds: float
    # The largest error over the largest value, compared with eager float32, of the chosen one.
    tolerance: float
    # Encoded images to measure with, and others to compare outputs on.
    images: Sequence[bytes]
    compared: Sequence[bytes]
    # The folder that int8 is calibrated on, as the catalog names it.
    calibration: str | None

    @property
    def baseline(self) -> Candidate:
        """Eager float32, with the defaults of the catalog and the machine."""
        entry = self.catalog.trunks[self.catalog.models[self.model].trunk]
        device = resolve_device(self.device).type
        options = WorkerOptions().resolve(device)
        return Candidate(
            engine="eager",
            precision="float32",
            transform="exact",
            streams=options.streams,
            max_batch_size=entry.batch_cap(device) or options.max_batch_size,
        )


@dataclass(slots=True)
class TuneResult:
    """What was measured, in its order, and the best within the tolerance."""

    best: Candidate
    measurements: dict[Candidate, Measurement] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


Report = Callable[[str], None]


class Search:
    """One search. `run` it once."""

    def __init__(self, request: TuneRequest, report: Report = lambda line: None) -> None:
        """
        Args:
            report: called with a line about what is measured next.
        """
        self._request = request
        self._report = report
        self._round_s = request.seconds * ROUND_SHARE
        self._end = time.monotonic() + request.seconds
        self._start_s = 0.0  # the longest start of a candidate so far, calibration aside
        self._result = TuneResult(request.baseline)
        self._served: dict[Candidate, Served] = {}

    async def run(self) -> TuneResult:
        """Measure stage by stage.

        Raises:
            ServiceError: the model does not load with eager float32.
        """
        baseline = self._request.baseline
        try:
            self._served[baseline] = await self._start(baseline)
            for stage in (self._engines, self._transforms, self._streams, self._batch_sizes):
                await self._run_stage(baseline, list(stage(self._result.best)))
        finally:
            for served in self._served.values():
                await served.close()
        return self._result

    # -- stages: variants of the best candidate ----------------------------------------------

    def _engines(self, best: Candidate) -> Iterator[Candidate]:
        for name in engine_classes():
            if name not in ("auto", best.engine):
                yield replace(best, engine=name)
        # In other precisions, `auto` takes the engine that has it.
        yield replace(best, engine="auto", precision="bfloat16")
        yield replace(best, engine="auto", precision="int8")

    def _transforms(self, best: Candidate) -> Iterator[Candidate]:
        yield replace(best, transform="fast")

    def _streams(self, best: Candidate) -> Iterator[Candidate]:
        yield replace(best, streams=usable_cores() if best.streams == 1 else 1)

    def _batch_sizes(self, best: Candidate) -> Iterator[Candidate]:
        for size in CAPS:
            yield replace(best, max_batch_size=size)

    # -- measuring ---------------------------------------------------------------------------

    async def _run_stage(self, baseline: Candidate, candidates: Sequence[Candidate]) -> None:
        """Measure the candidates together with the best so far, and choose the best of them."""
        for candidate in candidates:
            if candidate not in self._result.measurements and candidate not in self._served:
                await self._try_start(candidate)
        if self._result.measurements and len(self._served) == len({baseline, self._result.best}):
            return  # nothing new
        await self._measure()
        served_now = [self._result.measurements[candidate] for candidate in self._served]
        best = self._result.measurements[self._result.best]
        self._result.best = choose(best, served_now, self._request.tolerance).candidate
        for candidate in [*self._served]:
            if candidate not in (baseline, self._result.best):
                await self._served.pop(candidate).close()

    async def _try_start(self, candidate: Candidate) -> None:
        reason = self._refusal(candidate)
        if not reason:
            try:
                self._served[candidate] = await self._start(candidate)
            except ServiceError as error:
                reason = error.detail
            except ModelsError as error:
                reason = str(error)
        if reason:
            self._result.skipped.append(Skipped(candidate, reason))

    def _refusal(self, candidate: Candidate) -> str:
        """Why a candidate is not started; empty if it is."""
        if candidate.precision == "int8" and not self._request.calibration:
            return "no images to calibrate on: use --images"
        placement = Placement(
            device=resolve_device(self._request.device), precision=candidate.precision
        )
        # On a CPU without bfloat16, `auto` would take eager, which is slow there.
        on_cpu = placement.device.type == "cpu"
        name = "openvino" if on_cpu and candidate.engine == "auto" else candidate.engine
        if on_cpu and name in SLOW_ON_CPUS:
            return "it takes a minute to build each pass, and gains little on CPUs"
        try:
            if candidate.precision != "int8":  # whose calibration images the registry reads
                engine_class(name).place(placement)
        except ModelsError as error:
            return str(error)
        needed_s = self._start_s + ROUNDS * 2 * self._round_s
        return "no time left" if time.monotonic() + needed_s > self._end else ""

    async def _start(self, candidate: Candidate) -> Served:
        self._report(f"starting {candidate}")
        started = time.monotonic()
        request = self._request
        catalog = candidate.apply(request.catalog, request.model, request.calibration)
        served = Served(catalog, request.model, candidate, request.device)
        await served.start()
        if candidate.precision != "int8":
            self._start_s = max(self._start_s, time.monotonic() - started)
        return served

    async def _measure(self) -> None:
        rates: dict[Candidate, list[float]] = {candidate: [] for candidate in self._served}
        lone: dict[Candidate, list[float]] = {candidate: [] for candidate in self._served}
        images = self._request.images
        for number in range(ROUNDS):
            self._report(f"round {number + 1} of {ROUNDS}, {len(self._served)} candidates")
            for candidate, served in self._served.items():
                rates[candidate].append(await served.images_per_s(images, self._round_s))
                lone[candidate] += await served.lone_ms(images[:LONE_REQUESTS])
        reference = self._served[self._request.baseline]
        for candidate, served in self._served.items():
            agreement = None
            if served is not reference:
                agreement = await asyncio.to_thread(
                    served.agreement, reference, self._request.compared
                )
            self._result.measurements[candidate] = Measurement(
                candidate,
                statistics.median(rates[candidate]),
                statistics.median(lone[candidate]),
                agreement,
            )


def choose(best: Measurement, others: Sequence[Measurement], tolerance: float) -> Measurement:
    """The fastest of several measurements whose error is within the tolerance. One that is hardly
    faster than the best so far does not replace it."""
    allowed = [each for each in others if each.error <= tolerance]
    fastest = max(allowed, key=lambda each: each.images_per_s, default=best)
    return fastest if fastest.images_per_s > best.images_per_s * MIN_GAIN else best
