"""The trunks being served: each with its queue, its runner and the models that use it."""

import time
from collections import defaultdict

from models.errors import CheckpointError, ModelsError
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
from service.worker.trunk_keys import key_of, name_of
from service.worker_options import WorkerOptions


class ServedTrunks:
    """Starts to serve a trunk with the first model that uses it, and stops with the last one."""

    def __init__(self, registry: Registry, options: WorkerOptions, metrics: Metrics) -> None:
        self._registry = registry
        self._options = options
        self._metrics = metrics
        self.runners: dict[str, Runner] = {}
        # The models that use each served trunk, by the trunk's key as everything here.
        self._users: defaultdict[str, set[Model]] = defaultdict(set)
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
        for key, trunk in _trunks_of(model).items():
            if not self._users[key]:
                try:
                    self._start(key, trunk)
                except CheckpointError:
                    self.retire(model)
                    raise
            self._users[key].add(model)
            # There may be thousands of heads, so their series start with their first request.
            tasks = () if model.about else model.tasks
            self._metrics.add_model(model.name, name_of(key), tasks)

    def retire(self, model: Model) -> None:
        """Drain and remove the queues of trunks that no other model uses."""
        for key in _trunks_of(model):
            if model in self._users[key]:
                self._users[key].discard(model)
                if not self._users[key]:
                    self._drop_trunk(key)

    def keys_of(self, model: str | None) -> list[str]:
        """The served trunks of a model; of all models if it is None."""
        if model is None:
            return list(self.runners)
        try:
            trunks = _trunks_of(self._registry.ready(model))
        except ModelsError:
            return []
        return [key for key in trunks if key in self.runners]

    def head_bytes(self, trunk: str) -> int:
        """Bytes of the heads of the loaded models on a trunk, by its name."""
        if (loaded := self._registry.loaded_trunk(trunk)) is None:
            return 0
        users = list(self._users.get(key_of(loaded.trunk), ()))
        return sum(model.head_bytes for model in users if model.trunk is loaded.trunk)

    def failure(self, trunk: str) -> str | None:
        """Why the last probe of a trunk, by its name, failed, if it did."""
        loaded = self._registry.loaded_trunk(trunk)
        return None if loaded is None else self.prober.failures.get(key_of(loaded.trunk))

    def changed(self) -> list[str]:
        """The models on trunks whose engine or health has changed since the last call."""
        changed: list[str] = []
        for key, runner in list(self.runners.items()):
            engine = runner.trunk.engine
            known = engine.report(), engine.nbytes, self.prober.failures.get(key)
            if self._known.get(key) != known:
                self._known[key] = known
                changed += [model.name for model in list(self._users[key])]
        return changed

    def _start(self, key: str, trunk: Trunk) -> None:
        queue = self._queue(key, trunk)
        self.runners[key] = Runner(key, trunk, self._device, self._threads, self._metrics)
        self.batcher.add_queue(queue)
        try:
            self.prober.warm_up(key, min(queue.limit.value, queue.capacity))
        except CheckpointError:
            self._drop_trunk(key)
            raise

    def _queue(self, key: str, trunk: Trunk) -> BatchQueue:
        assert trunk.entry is not None, "the registry's trunks have entries"
        entry, options = trunk.entry, self._options
        delay_ms = entry.max_queue_delay_ms
        return BatchQueue(
            key,
            max_batch_size=entry.batch_cap(self._registry.device.type) or options.max_batch_size,
            capacity=options.max_queue_size,
            max_delay_s=(options.max_queue_delay_ms if delay_ms is None else delay_ms) / 1e3,
            runs_wide=trunk.engine.runs_wide,
        )

    def _drop_trunk(self, key: str) -> None:
        self.batcher.remove_queue(key)
        del self.runners[key], self._users[key]
        self._known.pop(key, None)
        self.prober.failures.pop(key, None)

    # -- called from the lanes -------------------------------------------------------------

    def _execute(self, batch: Batch) -> None:
        self.runners[batch.queue.name].execute(batch)

    def _drop(self, entry: Entry) -> None:
        reason = "expired" if entry.deadline <= time.monotonic() else "cancelled"
        self._metrics.dropped.labels(name_of(entry.payload.trunk), reason).inc()
        entry.payload.done(DeadlineExceededError("the deadline passed in the queue"))


def _trunks_of(model: Model) -> dict[str, Trunk]:
    """A model's trunks by their keys."""
    trunks = [model.trunk] if model.text is None else [model.trunk, model.text]
    return {key_of(trunk): trunk for trunk in trunks}
