"""A replica of a deployment: the worker's backend in an actor of Ray Serve."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ray import serve

from models.description import ModelDescription, State
from models.heads.files import write_whole
from service.clients import client
from service.errors import InternalError, ServiceError, UnavailableError
from service.head_file import trunk_of
from service.logs import configure_logs, request_id
from service.processes.worker import create_backend
from service.ray.groups import TrunkGroup
from service.ray.messages import Caller, Sent, Snapshot
from service.ray.scaling import QUEUE_SECONDS
from service.ray.state import SUFFIX, Changes, Version, ask, find_state
from service.settings import Settings
from service.types import FitRequest, HeadUpload, InferResult

logger = logging.getLogger(__name__)

SYNC_INTERVAL_S = 1.0
POLL_S = 0.05

T = TypeVar("T")


class Replica:
    """Serves one group of trunks. Errors that clients caused are returned, not raised, so that
    Ray raises only for replicas that are lost."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, group: TrunkGroup, threads: int
    ) -> None:
        """Returns once the group's start-up models are ready or failed, and heads are read.

        Args:
            threads: CPU threads, as many as the replica has been given.
        """
        configure_logs(settings.log_level)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._folder = Path(tempfile.mkdtemp(prefix="vitrail-replica-"))
        own = {
            "heads_folder": str(self._folder),
            "threads": settings.threads or threads,
            "decode_threads": settings.decode_threads or threads,
        }
        self._backend, _ = create_backend(settings.model_copy(update=own), only=group.models)
        self._models = frozenset(group.models)
        self._trunks = group.trunks
        self._state = find_state()
        self._version = Version()
        # The heads' files that the state actor has: modification time in ns and size in bytes.
        self._synced: dict[str, tuple[int, int]] = {}
        await self._backend.start()
        await self._pull()
        await self._settled()
        self._syncing = asyncio.create_task(self._sync())

    async def __del__(self) -> None:
        self._syncing.cancel()
        await self._backend.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def check_health(self) -> None:
        """Raise if only a restart can help; Ray Serve then replaces the replica."""
        health = self._backend.health()
        if not health.live:
            raise RuntimeError("; ".join(health.reasons))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scale_by_queue` reads."""
        return {QUEUE_SECONDS: self._backend.batcher.queue_seconds()}

    async def infer(self, sent: Sent) -> InferResult | ServiceError:
        """Run a request."""
        deadline = time.monotonic() + sent.remaining_s
        request = replace(sent.request, deadline=deadline)
        return await self._answer(sent.caller, lambda: self._backend.infer(request))

    async def snapshot(self) -> Snapshot:
        """The replica's models, heads and health."""
        heads = await self._backend.heads.all()
        names = self._models | {head.name for head in heads}
        models = [model for model in await self._backend.models() if model.name in names]
        return Snapshot(self._name, models, heads, self._backend.health())

    async def load(self, caller: Caller, name: str) -> ModelDescription | ServiceError:
        """Load a model."""
        return await self._answer(caller, lambda: self._backend.load(name))

    async def unload(self, caller: Caller, name: str) -> ModelDescription | ServiceError:
        """Unload a model."""
        return await self._answer(caller, lambda: self._backend.unload(name))

    async def describe(self, caller: Caller, name: str) -> ModelDescription | ServiceError:
        """A model, or why there is none."""
        return await self._answer(caller, lambda: self._backend.model(name))

    async def put_head(self, caller: Caller, upload: HeadUpload) -> bytes | ServiceError:
        """Store a trained head and serve it. Returns the content of its file."""

        async def put() -> bytes:
            await self._backend.heads.put(upload)
            return (self._folder / f"{upload.name}{SUFFIX}").read_bytes()

        return await self._answer(caller, put)

    async def fit_head(self, caller: Caller, request: FitRequest) -> Any:
        """Start to fit a head."""
        return await self._answer(caller, lambda: self._backend.heads.fit(request))

    async def delete_head(self, caller: Caller, name: str) -> ServiceError | None:
        """Delete a head, or cancel its fit."""
        self._synced.pop(name, None)
        return await self._answer(caller, lambda: self._backend.heads.delete(name))

    async def read_head(self, caller: Caller, name: str, part: str) -> bytes | ServiceError:
        """The content of a head's file."""
        return await self._answer(caller, lambda: self._backend.heads.read(name, part))

    async def _answer(self, caller: Caller, work: Callable[[], Awaitable[T]]) -> T | ServiceError:
        client.set(caller.client)
        request_id.set(caller.request_id)
        try:
            return await work()
        except ServiceError as error:
            return error
        except Exception:
            logger.exception("a request failed")
            return InternalError("internal error; see the server's log")

    async def _settled(self) -> None:
        while True:
            states = {self._backend.registry.state(name) for name in self._backend.startup}
            if not states & {State.UNLOADED, State.LOADING} and self._backend.heads.settled:
                return
            await asyncio.sleep(POLL_S)

    # -- the state that all replicas share -------------------------------------------------

    async def _sync(self) -> None:
        while True:
            try:
                await self._push()
                await self._pull()
            except UnavailableError as error:  # the actor is restarting; the next round tries again
                logger.warning("%s", error.detail)
            except Exception:
                logger.exception("the state of the cluster cannot be applied")
            await asyncio.sleep(SYNC_INTERVAL_S)

    async def _push(self) -> None:
        """Send the heads that the state actor lacks, such as those that were fitted here."""
        for path in self._folder.glob(f"*{SUFFIX}"):
            if self._synced.get(path.stem) != (stamp := _stamp(path)):
                await self._ask("put_head", path.stem, path.read_bytes())
                self._synced[path.stem] = stamp

    async def _pull(self) -> None:
        changes: Changes = await self._ask("since", self._version)
        if changes.reset:  # what the actor lacks is sent to it next
            self._synced.clear()
        for name, content in changes.heads.items():
            path = self._folder / f"{name}{SUFFIX}"
            if content is None:
                if self._synced.pop(name, None) is not None:
                    path.unlink(missing_ok=True)
                continue
            if trunk_of(content) not in self._trunks:  # another group serves it
                continue
            if not path.exists() or path.read_bytes() != content:
                write_whole(path, content)
            self._synced[name] = _stamp(path)
        heads = {head.name for head in await self._backend.heads.all()}
        for model, loaded in changes.loaded.items():
            if model not in self._models | heads:
                continue
            work = self._backend.load if loaded else self._backend.unload
            try:
                await work(model)
            except ServiceError as error:
                logger.error("model %s: %s", model, error.detail)
        self._version = changes.version

    async def _ask(self, method: str, *arguments: Any) -> Any:
        return await ask(lambda: self._state, method, *arguments)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
