"""The trunks being served: each with its queue, its runner and the models that use it."""

import time

from models.errors import CheckpointError
from models.model import Model
from models.registry import Registry
from models.trunks.base import Trunk
from models.trunks.engines.report import EngineReport
from service.errors import DeadlineExceededError
from service.metrics import Metrics
from service.worker.batch_queue import BatchQueue, Entry
from service.worker.batcher import Batcher
from service.worker.device import create_device
from service.worker.prober import Prober
from service.worker.runner import Runner, Threads
from service.worker.scheduler import Batch, Scheduler
from service.worker_options import WorkerOptions


class ServedTrunks:
    """Starts to serve a trunk with the first model that uses it, and stops with the last one."""

    def __init__(self, registry: Registry, options: WorkerOptions, metrics: Metrics) -> None:
        self._registry = registry
        self._options = options
        self._metrics = metrics
        self.runners: dict[str, Runner] = {}
        self._users: dict[str, set[str]] = {name: set() for name in registry.catalog.trunks}
        # What descriptions say of each trunk that may change while it is loaded.
        self._known: dict[str, tuple[EngineReport, int, str | None]] = {}
        self._device = create_device(registry.device)
        on_cpu = registry.device.type == "cpu"
        # A GPU's lanes start kernels, for which further threads do nothing.
        lane_threads = options.lane_threads if on_cpu else 1
        self._threads = Threads(lane=lane_threads, wide=options.threads)
        # If each lane has several threads, a wide batch would need a pool of threads of its own.
        cpu = on_cpu and lane_threads == 1
        scheduler = Scheduler(lanes=options.streams, cpu=cpu)
        self.batcher = Batcher(scheduler, execute=self._execute, drop=self._drop)
        self.prober = Prober(
            self.batcher,
            self.runners,
            interval_s=options.probe_interval_s,
            limit_s=options.stuck_after_s,
        )

    def serve(self, model: Model) -> None:
        """Create the queues of the model's trunks and warm the trunks up.

        Raises:
            CheckpointError: a trunk does not run. The model's trunks are then retired.
        """
        for name, trunk in self._trunks_of(model):
            if not self._users[name]:
                try:
                    self._start(name, trunk)
                except CheckpointError:
                    self.retire(model)
                    raise
            self._users[name].add(model.name)
            # There may be thousands of heads, so their series start with their first request.
            self._metrics.add_model(model.name, name, () if model.about else model.tasks)

    def retire(self, model: Model) -> None:
        """Drain and remove the queues of trunks that no other model uses."""
        for name, _ in self._trunks_of(model):
            if model.name in self._users[name]:
                self._users[name].discard(model.name)
                if not self._users[name]:
                    self._drop_trunk(name)

    def names_of(self, model: str | None) -> list[str]:
        """The served trunks of a model; of all models if it is None."""
        if model is None:
            return list(self.runners)
        entry = self._registry.catalog.models.get(model)
        names = {entry.trunk, entry.text} if entry is not None else set()
        return [name for name in names if name in self.runners]

    def changed(self) -> list[str]:
        """The models on trunks whose engine or health has changed since the last call."""
        changed: list[str] = []
        for name, runner in list(self.runners.items()):
            engine = runner.trunk.engine
            known = engine.report(), engine.nbytes, self.prober.failures.get(name)
            if self._known.get(name) != known:
                self._known[name] = known
                changed += list(self._users[name])
        return changed

    def _trunks_of(self, model: Model) -> list[tuple[str, Trunk]]:
        entry = self._registry.catalog.model(model.name)
        trunks = [(entry.trunk, model.trunk)]
        if entry.text is not None and entry.text != entry.trunk and model.text is not None:
            trunks.append((entry.text, model.text))
        return trunks

    def _start(self, name: str, trunk: Trunk) -> None:
        queue = self._queue(name)
        self.runners[name] = Runner(name, trunk, self._device, self._threads, self._metrics)
        self.batcher.add_queue(queue)
        try:
            self.prober.warm_up(name, min(queue.limit.value, queue.capacity))
        except CheckpointError:
            self._drop_trunk(name)
            raise

    def _queue(self, name: str) -> BatchQueue:
        entry, options = self._registry.catalog.trunks[name], self._options
        delay_ms = entry.max_queue_delay_ms
        return BatchQueue(
            name,
            max_batch_size=entry.batch_cap(self._registry.device.type) or options.max_batch_size,
            capacity=options.max_queue_size,
            max_delay_s=(options.max_queue_delay_ms if delay_ms is None else delay_ms) / 1e3,
        )

    def _drop_trunk(self, name: str) -> None:
        self.batcher.remove_queue(name)
        del self.runners[name]
        self._known.pop(name, None)
        self.prober.failures.pop(name, None)

    # -- called from the lanes -------------------------------------------------------------

    def _execute(self, batch: Batch) -> None:
        self.runners[batch.queue.name].execute(batch)

    def _drop(self, entry: Entry) -> None:
        reason = "expired" if entry.deadline <= time.monotonic() else "cancelled"
        self._metrics.dropped.labels(entry.payload.trunk, reason).inc()
        entry.payload.done(DeadlineExceededError("the deadline passed in the queue"))
