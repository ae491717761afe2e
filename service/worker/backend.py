"""The backend that runs models in this process."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from models.description import ModelDescription, State
from models.errors import ModelNotFoundError, ModelsError
from models.heads.prompted import Prompted, with_class_embeddings
from models.inputs.types import modality_of
from models.model import Model
from models.registry import Registry
from service.changes import ChangeLog, changes_since
from service.clients import client
from service.decoding.pool import create_decoder
from service.describing import describe_each
from service.errors import DeadlineExceededError, ServiceError, from_library
from service.garbage import look_at_all_objects
from service.limits import check_answer_size
from service.metrics import Metrics
from service.types import Health, InferRequest, InferResult, ModelChanges
from service.worker.admission import Claim, UnloadedError
from service.worker.catalog_watch import CatalogWatch
from service.worker.execution_plan import (
    ExecutionPlan,
    ResolvedCall,
    answer_values,
    plan_execution,
    resolve,
)
from service.worker.fit_jobs import FitJobs
from service.worker.head_store import HeadStore
from service.worker.loader import Loader, load_model, unload_models
from service.worker.on_demand import OnDemand
from service.worker.pipeline import Pipeline, until
from service.worker.prompts import PromptCache
from service.worker.runner import use_threads
from service.worker.text_embedder import TextEmbedder
from service.worker.trunks import ServedTrunks
from service.worker_options import WorkerOptions

logger = logging.getLogger(__name__)

# How often a request is planned again because a model was replaced before it was admitted.
MAX_REPLANS = 3


class LocalBackend:
    """Owns the device, the decode pool and the registry of one process. Implements `Backend`."""

    def __init__(self, registry: Registry, options: WorkerOptions, metrics: Metrics) -> None:
        self.registry = registry
        self.options = options.resolve(registry.device.type)
        self._metrics = metrics
        self._startup = options.startup or registry.catalog.startup
        self._limits = options.image_limits
        self.trunks = ServedTrunks(registry, self.options, metrics)
        self.batcher = self.trunks.batcher
        use_threads(1)  # all threads but the lanes' use one; `use_threads` explains why
        self._pool = ThreadPoolExecutor(
            self.options.decode_threads + 1, "decode", initializer=partial(use_threads, 1)
        )
        self.decoder = create_decoder(
            self.options.decoders, self._limits, self.options.decode_cpu_s, metrics
        )
        self._loader = Loader(registry.device)
        folder = Path(options.heads_folder or registry.store.root / "heads")
        self._fit_jobs = FitJobs(registry, folder, self.batcher, self._limits, metrics)
        self.heads = HeadStore(
            registry, folder, self._fit_jobs, self._loader.run,
            lambda find: self._on_demand.trunk_loaded(find),
        )  # fmt: skip
        self._pipeline = Pipeline(
            self.batcher, metrics, self._pool, self.options.decode_threads, self._limits,
            self.decoder, self.options.max_bytes_in_flight,
        )  # fmt: skip
        embedder = TextEmbedder(self._pipeline, self.options.max_batch_size)
        self._prompts = PromptCache(embedder.embed, options.label_cache_bytes, metrics)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        registry.on_load = self._on_load
        registry.on_unload = self.trunks.retire
        self.watch = CatalogWatch(
            registry,
            startup=options.startup,
            interval_s=options.catalog_poll_s,
            in_loader=self._loader.run,
            after=self.heads.renew,
            on_change=self._note_change,
            metrics=metrics,
        )
        self._on_demand = OnDemand(
            registry,
            self.options.model_memory_mb,
            startup=lambda: options.startup or registry.catalog.startup,
            fitted_on=self._fit_jobs.trunks,
            head_bytes=self.trunks.head_bytes,
            in_loader=self._loader.run,
            load=partial(load_model, registry=registry),
            unload=self._evict,
        )
        self._changes = ChangeLog()
        for name in registry.names():
            self._changes.touch(name)
        registry.on_change = self._note_change

    @property
    def startup(self) -> Sequence[str]:
        """The models that must be ready: those that were loaded at start, unless they are gone.
        Models that the catalog gets later load while the others serve."""
        return [name for name in self._startup if self.knows(name)]

    # -- Backend ---------------------------------------------------------------------------

    async def start(self) -> None:
        self.decoder.start()
        self.batcher.start()
        for name in self._startup:
            self.registry.catalog.model(name)
            self._spawn(self._load_quietly(name))
        self._spawn(self._on_demand.run())
        self._spawn(self.heads.run())
        self._spawn(self.trunks.prober.run())
        if self.options.catalog_poll_s:
            self._spawn(self.watch.run())

    def drain(self) -> None:
        self._closing = True

    async def close(self) -> None:
        self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._fit_jobs.close)
        await asyncio.to_thread(self.batcher.close)
        self._pool.shutdown()
        self._pipeline.close()
        self.decoder.close()
        self._loader.close()
        look_at_all_objects()  # a program that starts another backend wants the memory back

    def check_headers(self, model: str | None, *, bulk: bool, deadline: float) -> None:
        trunks = self.trunks.keys_of(model)
        self._pipeline.admission.check_headers(trunks, Claim(client.get(), bulk, deadline))

    async def infer(self, request: InferRequest) -> InferResult:
        for _ in range(MAX_REPLANS):
            try:
                return await self._infer_loaded(request)
            except UnloadedError:  # if the model was replaced, the new one serves the request
                await asyncio.sleep(0)
        return await self._infer_loaded(request)

    async def _infer_loaded(self, request: InferRequest) -> InferResult:
        async with self._on_demand.loaded(request.calls, request.deadline):
            return await self._infer(request)

    async def _infer(self, request: InferRequest) -> InferResult:
        inputs = request.readable
        modalities = dict.fromkeys(map(modality_of, inputs)) or {"image": None}
        # all at once, so that one version of a model does the whole request
        resolved = {
            modality: [resolve(self.registry, call, modality) for call in request.calls]
            for modality in modalities
        }
        check_answer_size(answer_values(resolved, inputs))
        plans = {
            kind: await self._plan(calls, request.deadline) for kind, calls in resolved.items()
        }
        claim = Claim(client.get(), request.bulk, request.deadline)
        results = await self._pipeline.run(plans, inputs, claim)
        first = next(iter(plans.values()))
        return InferResult([call.used for call in first.calls], results)

    async def models(self, start: int = 0, count: int | None = None) -> Sequence[ModelDescription]:
        names = self.registry.names(start, count)
        return list(filter(None, (await describe_each(names, self._describe)).values()))

    async def changes(self, since: str) -> ModelChanges:
        for name in self.trunks.changed():
            self._changes.touch(name)
        return await changes_since(self._changes, since, self._describe)

    async def model(self, name: str) -> ModelDescription:
        try:
            return self._served(self.registry.describe(name))
        except ModelsError as error:
            raise from_library(error) from error

    def _describe(self, name: str) -> ModelDescription | None:
        try:
            return self._served(self.registry.describe(name))
        except ModelNotFoundError:  # removed meanwhile
            return None

    def _served(self, description: ModelDescription) -> ModelDescription:
        """The description, completed with what only the server knows."""
        failure = self.trunks.failure(description.trunk)
        return replace(
            description,
            startup=description.name in self._startup,
            on_demand=self._on_demand.loads(description.name) or None,
            reason=failure or description.reason,
            update_error=self.watch.failures.get(description.name),
        )

    async def load(self, name: str) -> ModelDescription:
        await self._on_demand.load(name)
        return await self.model(name)

    async def unload(self, name: str) -> ModelDescription:
        self._on_demand.stop(name)
        await self._loader.run(unload_models, [name], self.registry)
        return await self.model(name)

    def knows(self, model: str) -> bool:
        return model in self.registry.catalog.models

    def state(self) -> dict[str, Any]:
        return self.batcher.state() | {"decoding": self._pipeline.admission.decoding.state()}

    def health(self) -> Health:
        dead = []
        if not self.batcher.alive():
            dead.append("a thread that runs batches has died")
        if (stuck := self.batcher.stuck_for()) > self.options.stuck_after_s:
            dead.append(f"a batch has been running for {stuck:.0f} s")
        waiting = ["draining before exit"] if self._closing else []
        waiting += [
            f"model {name} is {state}"
            for name in self.startup
            if (state := self.watch.state(name)) is not State.READY
        ]
        waiting += [] if self.heads.settled else ["the folder of heads has not been read yet"]
        waiting += [f"trunk {n}: {why}" for n, why in self.trunks.prober.failures.items()]
        return Health(
            live=not dead,
            ready=not dead and not waiting,
            reasons=dead + waiting,
            draining=self._closing,
            loading=self._loader.busy or self.watch.applying,
        )

    def undecoded(self) -> int:
        """The number of inputs that wait to be decoded."""
        return self._pipeline.admission.decoding.depth()

    # -- planning a request ----------------------------------------------------------------

    async def _plan(self, calls: Sequence[ResolvedCall], deadline: float) -> ExecutionPlan:
        """The plan of a request's calls; prompted heads get class embeddings."""
        try:
            async with until(deadline):
                return plan_execution([await self._with_classes(call) for call in calls])
        except TimeoutError as error:
            raise DeadlineExceededError(
                "the deadline passed before the labels were embedded"
            ) from error

    async def _with_classes(self, call: ResolvedCall) -> ResolvedCall:
        if not isinstance(call.head, Prompted):
            return call
        labels, templates = call.head.prompt(call.finish_options)
        classes = await self._prompts.get(call.model, labels, templates)
        options = with_class_embeddings(call.finish_options, labels, classes)
        return replace(call, finish_options=options)

    # -- background ------------------------------------------------------------------------

    def _on_load(self, model: Model) -> None:
        """Build and serve the model's trunks, and compute the embeddings of its own labels."""
        model.build()
        self.trunks.serve(model)
        head = model.heads[model.task]
        if isinstance(head, Prompted) and head.labels:
            self._prompts.prepare(model, head.labels, head.templates)

    def _note_change(self, name: str) -> None:
        self._changes.touch(name, removed=not self.knows(name))

    def _evict(self, names: Sequence[str]) -> None:
        unload_models(names, self.registry)
        self.heads.wait_for_trunks(names)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load_quietly(self, name: str) -> None:
        try:
            await self._loader.run(load_model, name, self.registry)
        except ServiceError as error:
            logger.error("model %s did not load: %s", name, error.detail)
