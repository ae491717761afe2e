"""Runs shards: the worker's backend in a thread of this process, which may be an actor of Ray."""

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from models.description import State
from service.bulk.job import Job, Results
from service.bulk.shards import Shard, SourceFormatError, read_shard
from service.errors import InvalidInputError, ServiceError, UnavailableError
from service.processes.worker import create_backend
from service.settings import Settings
from service.types import WHOLE_REQUEST_STATUSES, Call, ImageResult, InferRequest, InferResult

CHUNK = 64
# Chunks that are read and computed at the same time.
IN_FLIGHT = 2
# A chunk that is refused or fails for reasons that are not the images' fault is run again.
ATTEMPTS = 5
TIMEOUT_S = 3600.0

T = TypeVar("T")


class ShardRunner:
    """Loads a job's model once, and runs shards one after the other."""

    def __init__(self, settings: Settings, job: Job) -> None:
        """
        Raises:
            UnavailableError: the model cannot be loaded.
        """
        self._job = job
        self._results = Results(job)
        self._backend, _ = create_backend(settings, only=(job.model,))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bulk", daemon=True)
        self._thread.start()
        try:
            self._await(self._start())
        except BaseException:
            self.close()
            raise

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Run shards as Ray Data passes them: `{"shard": [JSON]}`.

        Returns:
            For each shard, the number of its images and of those that failed.
        """
        counts = [self.run(Shard.from_json(str(text))) for text in batch["shard"]]
        return {"images": [n for n, _ in counts], "failed": [failed for _, failed in counts]}

    def run(self, shard: Shard) -> tuple[int, int]:
        """Run one shard and write its results. Returns the numbers of images and of failures."""
        return self._await(self._run(shard))

    def close(self) -> None:
        """Stop the backend."""
        self._await(self._backend.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> None:
        await self._backend.start()
        model = await self._backend.load(self._job.model)
        if model.state != State.READY:
            raise UnavailableError(f"model {model.name} is {model.state}: {model.reason}")

    async def _run(self, shard: Shard) -> tuple[int, int]:
        places = asyncio.Semaphore(IN_FLIGHT)
        pending: list[asyncio.Task[InferResult]] = []
        names: list[str] = []
        unreadable: set[int] = set()

        async def infer(images: list[bytes]) -> InferResult:
            try:
                return await self._infer(images)
            finally:
                places.release()

        chunks = _chunks(read_shard(shard))
        try:
            async with asyncio.TaskGroup() as group:
                while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                    for name, content in chunk:
                        if content is None:
                            unreadable.add(len(names))
                        names.append(name)
                    await places.acquire()
                    images = [content for _, content in chunk if content is not None]
                    pending.append(group.create_task(infer(images)))
        except* (SourceFormatError, ServiceError) as errors:
            raise errors.exceptions[0] from None
        done = [task.result() for task in pending]
        computed = iter([image for result in done for image in result.images])
        missing = InvalidInputError("the image cannot be read")
        rows = [
            (name, ImageResult(error=missing) if n in unreadable else next(computed))
            for n, name in enumerate(names)
        ]
        failed = await asyncio.to_thread(self._results.write, shard, rows, done[0].models[0])
        return len(rows), failed

    async def _infer(self, images: list[bytes]) -> InferResult:
        for attempt in itertools.count(1):
            request = InferRequest(
                inputs=images,
                calls=[Call(self._job.model, self._job.task, self._job.options)],
                deadline=time.monotonic() + TIMEOUT_S,
                bulk=True,
            )
            try:
                result = await self._backend.infer(request)
                for error in _errors(result):
                    if error.status in WHOLE_REQUEST_STATUSES:
                        raise error
                return result
            except ServiceError as error:
                if error.status not in WHOLE_REQUEST_STATUSES or attempt == ATTEMPTS:
                    raise
            await asyncio.sleep(attempt)
        raise AssertionError("unreachable")


def _errors(result: InferResult) -> Iterable[ServiceError]:
    for image in result.images:
        yield from (o for o in (image.error, *image.outputs) if isinstance(o, ServiceError))


def _chunks(
    images: Iterable[tuple[str, bytes | None]],
) -> Iterator[list[tuple[str, bytes | None]]]:
    """At least one chunk, so that an empty shard has an empty table."""
    iterator = iter(images)
    yield list(itertools.islice(iterator, CHUNK))
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk
