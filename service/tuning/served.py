"""A model served in this process with a candidate's settings, and measured without HTTP."""

import asyncio
import itertools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry
from torch import Tensor

from models.catalog import Catalog
from models.heads.prompted import Prompted
from models.inference import decode
from models.inputs.images import DEFAULT_LIMITS
from models.registry import Registry
from models.trunks.base import Trunk
from models.trunks.devices import resolve_device
from models.trunks.engines.comparison import compare
from models.trunks.engines.report import Agreement
from models.trunks.features import LAST_OUTPUT
from service.errors import ServiceError
from service.metrics import Metrics
from service.tuning.candidate import Candidate
from service.types import Call, InferRequest
from service.worker.backend import LocalBackend
from service.worker_options import WorkerOptions

# Requests that are always under way while the rate is measured.
CONCURRENCY = 32
COMPARED_BATCH = 8


class Served:
    """One candidate's backend. `start` it, measure, `close` it."""

    def __init__(self, catalog: Catalog, model: str, candidate: Candidate, device: str) -> None:
        """
        Args:
            catalog: as `Candidate.apply` returns it.
        """
        self.candidate = candidate
        self._model = model
        # No heads are served besides the model, and no probe runs meanwhile.
        self._folder = tempfile.TemporaryDirectory(prefix="vitrail-tune-")
        options = WorkerOptions(
            streams=candidate.streams, heads_folder=self._folder.name, probe_interval_s=1e6
        )
        resolved = options.resolve(resolve_device(device).type)
        self._registry = Registry(
            catalog, device=device, threads=resolved.threads, streams=resolved.streams
        )
        self._backend = LocalBackend(self._registry, options, Metrics(CollectorRegistry()))
        self._call = Call(model, None)

    async def start(self) -> None:
        """Load the model and warm it up.

        Raises:
            ServiceError: it does not load with these settings.
        """
        await self._backend.start()
        try:
            await self._backend.load(self._model)
        except ServiceError:
            await self.close()
            raise
        model = self._registry.ready(self._model)
        if isinstance(model.heads[model.task], Prompted):  # which needs labels
            self._call = Call(self._model, "embed")

    async def close(self) -> None:
        """Free everything."""
        await self._backend.close()
        await asyncio.to_thread(self._registry.unload, self._model)
        self._folder.cleanup()

    @property
    def trunk(self) -> Trunk:
        """The model's trunk."""
        return self._registry.ready(self._model).trunk

    async def images_per_s(self, images: Sequence[bytes], seconds: float) -> float:
        """The rate at which `CONCURRENCY` clients get answers, each of which sends one image at a
        time."""
        remaining = itertools.cycle(images)
        started = time.monotonic()
        done = 0

        async def ask() -> None:
            nonlocal done
            while time.monotonic() - started < seconds:
                await self._infer(next(remaining))
                done += 1

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CONCURRENCY):
                    group.create_task(ask())
        except* ServiceError as errors:
            raise errors.exceptions[0] from None
        return done / (time.monotonic() - started)

    async def lone_ms(self, images: Sequence[bytes]) -> list[float]:
        """The milliseconds of each image's request, one after another."""
        durations = []
        for image in images:
            started = time.monotonic()
            await self._infer(image)
            durations.append((time.monotonic() - started) * 1e3)
        return durations

    async def _infer(self, image: bytes) -> None:
        request = InferRequest(inputs=[image], calls=[self._call], deadline=math.inf)
        result = await self._backend.infer(request)
        [answer] = result.images
        output = answer.error or answer.outputs[0]
        if isinstance(output, ServiceError):
            raise output

    def agreement(self, reference: "Served", images: Sequence[bytes]) -> Agreement:
        """The agreement with a reference on encoded images, transform included. The largest error
        is at least the one that the engine reports for its passes."""
        own = self.trunk.engine.report().agreement
        starts = range(0, len(images), COMPARED_BATCH)
        parts = (images[start : start + COMPARED_BATCH] for start in starts)
        pairs = ((_outputs(reference.trunk, part), _outputs(self.trunk, part)) for part in parts)
        agreement = compare(reference.trunk, pairs)
        if own is None:
            return agreement
        return replace(agreement, largest_error=max(agreement.largest_error, own.largest_error))


def _outputs(trunk: Trunk, images: Sequence[bytes]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Images as the trunk takes them, and the outputs of their pass."""
    decoded = [decode(image, DEFAULT_LIMITS, trunk.min_side) for image in images]
    batch = trunk.collate([trunk.prepare(each) for each in decoded]).to(trunk.placement.device)
    plan, inputs, _ = trunk.pass_inputs(batch, LAST_OUTPUT)
    return batch, trunk.engine.run(plan, inputs)
