"""Serves the heads in a folder: uploaded, fitted here, or copied there by other programs."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

from models.catalog import ModelEntry
from models.description import HeadDescription, ModelDescription, State, UnservedHead
from models.errors import CheckpointError, ModelNotFoundError, ModelsError
from models.heads.files import HeadFile, encode_head, read_head
from models.heads.lora import LORA
from models.registry import Registry
from service.backend import PARTS
from service.describing import describe_each
from service.errors import ConflictError, InsufficientStorageError, InvalidInputError, NotFoundError
from service.garbage import leave_out_old_objects
from service.head_file import trunk_of
from service.types import FitRequest, HeadUpload
from service.worker.fit_jobs import FitJobs
from service.worker.head_folder import INTERVAL_S, NAME, Change, HeadFolder
from service.worker.head_upload import check_fits, decode_upload

logger = logging.getLogger(__name__)

# How long changed heads are loaded at a time, so that other changes of the registry get a turn.
SLICE_S = 0.25
MAX_HEADS = 200_000
# Most bytes of all heads' files, which are also in memory while their trunks are loaded.
MAX_BYTES = 4 * 2**30


class HeadStore:
    """Keeps the registry's heads in sync with a folder, which several processes may share.

    All changes of the folder and of the registry run in the loader's thread, so that they need no
    lock.
    """

    def __init__(
        self, registry: Registry, folder: Path, fit_jobs: FitJobs,
        in_loader: Callable[..., Awaitable[Any]],  # runs a function in the loader's thread
        trunk_loaded: Callable[[Callable[[], str]], AbstractAsyncContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._folder = HeadFolder(folder)
        self._fit_jobs = fit_jobs
        self._in_loader = in_loader
        # A context in which the trunk that a function finds is loaded, if it may be on demand.
        self._trunk_loaded = trunk_loaded
        # Whether heads have been loaded since the garbage collector was told.
        self._has_loaded = False
        # Declared heads whose trunk was not loaded yet, by trunk.
        self._unloaded: defaultdict[str, dict[str, None]] = defaultdict(dict)
        # Heads that are to be tried again, since trunks have changed.
        self._stale: dict[str, None] = {}
        # Why a head's file cannot be served.
        self._failures: dict[str, str] = {}
        # True once the folder has been read.
        self.settled = False

    async def run(self) -> None:
        """Watch the folder until cancelled."""
        while True:
            try:
                if await self._in_loader(self._sync):
                    continue
                self.settled = True
            except Exception:
                logger.exception("the folder of heads cannot be read")
            await asyncio.sleep(INTERVAL_S)

    # -- Heads -----------------------------------------------------------------------------

    async def all(self) -> Sequence[HeadDescription]:
        names = dict.fromkeys([*self._folder.names(), *self._fit_jobs.names()])
        described = await describe_each(names, self._describe)
        return list(filter(None, described.values()))

    async def get(self, name: str) -> HeadDescription:
        if (head := self._describe(name)) is None:
            raise NotFoundError(f"no head {name!r}", field="name")
        return head

    async def put(self, upload: HeadUpload) -> HeadDescription:
        async with self._trunk_loaded(lambda: upload.trunk or trunk_of(upload.content)):
            await self._in_loader(self._put, upload)
        return await self.get(upload.name)

    async def fit(self, request: FitRequest) -> HeadDescription:
        def accept() -> None:
            self._check_name(request.name, request.trunk, request.replace)
            self._fit_jobs.accept(request)

        async with self._trunk_loaded(lambda: request.trunk):
            await self._in_loader(accept)
        return await self.get(request.name)

    async def delete(self, name: str) -> None:
        await self._in_loader(self._delete, name)

    async def read(self, name: str, part: str) -> bytes:
        if part not in PARTS or not NAME.fullmatch(name):
            raise NotFoundError(f"a head has no file {part!r}; it has {', '.join(PARTS)}")
        path = self._folder.file(name) if part == PARTS[0] else self._folder.report(name) / part
        try:
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise NotFoundError(f"the head {name!r} has no file {part}", field="name") from error

    # -- in the loader's thread ------------------------------------------------------------

    def renew(self) -> None:
        """Have the heads that are not served tried again, now that trunks have changed."""
        self._stale = dict.fromkeys(filter(self._is_unserved, self._folder.names()))

    def wait_for_trunks(self, names: Sequence[str]) -> None:
        """Have those of these models that are heads loaded again with their trunks."""
        for name in filter(self._folder.__contains__, names):
            self._unloaded[self._registry.catalog.model(name).trunk][name] = None

    def _is_unserved(self, name: str) -> bool:
        if name in self._failures or name not in self._registry.catalog.models:
            return True
        return self._registry.state(name) is State.FAILED

    def _put(self, upload: HeadUpload) -> None:
        try:
            head = decode_upload(upload, self._registry)
            self._check_name(upload.name, head.trunk, upload.replace)
            check_fits(head, self._registry)
        except CheckpointError as error:
            raise InvalidInputError(str(error), field="file") from error
        self._folder.write(upload.name, encode_head(head))
        self._look(upload.name)

    def _check_name(self, name: str, trunk: str, may_replace: bool) -> None:
        if not NAME.fullmatch(name):
            raise InvalidInputError(
                f"name is {name!r}; it must be up to 100 letters, digits, '.', '_' or '-', and "
                "start with a letter or digit",
                field="name",
            )
        if name in self._registry.declared:
            raise ConflictError(f"the catalog already has a model {name!r}", field="name")
        if self._folder.file(name).exists() and not may_replace:
            raise ConflictError(
                f"a head {name!r} already exists; set replace=true, or delete it", field="name"
            )
        if (old := self._registry.catalog.models.get(name)) and old.trunk != trunk:
            raise ConflictError(
                f"the head {name!r} is for the trunk {old.trunk!r}; delete it first", field="name"
            )
        if self._fit_jobs.is_busy(name):
            raise ConflictError(f"a head {name!r} is already being fitted", field="name")
        if len(self._folder) >= MAX_HEADS and name not in self._folder:
            raise InsufficientStorageError(
                f"the server has {MAX_HEADS} heads, the most it can have; delete some"
            )
        if self._folder.nbytes >= MAX_BYTES:
            raise InsufficientStorageError(
                f"the server's heads have {MAX_BYTES} bytes, the most they can have; delete some"
            )

    def _delete(self, name: str) -> None:
        cancelled = self._fit_jobs.cancel(name)
        if name not in self._folder and not cancelled:
            reason = " but a model of the catalog" if name in self._registry.declared else ""
            raise NotFoundError(f"{name!r} is not a head{reason}", field="name")
        self._folder.delete(name)
        self._look(name)

    def _sync(self) -> bool:
        """Bring the registry closer to the folder. Returns whether more is to be done at once."""
        if self._folder.scan():
            self._fit_jobs.poll()
        for name in self._fit_jobs.finished():
            self._look(name)
        until = time.monotonic() + SLICE_S
        while (more := self._step()) and time.monotonic() < until:
            pass
        if self._has_loaded:
            leave_out_old_objects()
            self._has_loaded = False
        return more

    def _step(self) -> bool:
        """Bring one head up to date. Returns whether there was one."""
        if (name := self._folder.pending()) is not None:
            self._look(name)
        elif self._stale:
            self._retry(self._stale.popitem()[0])
        elif (name := self._loadable()) is not None:
            self._load(name)
        else:
            return False
        return True

    def _look(self, name: str) -> None:
        """Serve a head's file as it is now."""
        match self._folder.look(name):
            case Change.WRITTEN:
                self._update(name)
            case Change.DELETED:
                self._remove(name)

    def _retry(self, name: str) -> None:
        """Serve a head that was not served before, if its file still exists."""
        if name not in self._folder or not self._is_unserved(name):
            return
        if name in self._failures or name not in self._registry.catalog.models:
            self._update(name)
        else:
            self._load(name)

    def _loadable(self) -> str | None:
        """Remove and return a head that waited for its trunk, which is loaded now."""
        for trunk, names in self._unloaded.items():
            if self._registry.loaded_trunk(trunk) is None:
                continue
            while names:
                name = next(iter(names))
                del names[name]
                if name in self._registry.catalog.models:  # it may be gone with its old trunk
                    return name
        return None

    def _update(self, name: str) -> None:
        """Declare the head of a new or changed file, and load it if its trunk is loaded."""
        try:
            self._declare(name)
        except ModelsError as error:
            self._failures[name] = str(error)
            logger.warning("head %s: %s", name, error)
        else:
            self._failures.pop(name, None)
            self._load(name)
        # Only now: a request between the two would find neither the job nor the head.
        self._fit_jobs.forget(name)

    def _declare(self, name: str) -> None:
        if name in self._registry.declared:
            raise CheckpointError("the catalog already has a model of that name")
        head = read_head(self._folder.file(name))
        self._registry.add(
            ModelEntry(
                name=name,
                trunk=head.trunk,
                task=head.task,
                head=f"file:{self._folder.file(name).absolute()}",
                description=_summary(head),
            )
        )

    def _load(self, name: str) -> None:
        """Load a head now, or once its trunk is loaded."""
        trunk = self._registry.catalog.model(name).trunk
        if self._registry.loaded_trunk(trunk) is None:
            self._unloaded[trunk][name] = None
            return
        self._has_loaded = True
        try:
            self._registry.load(name)
        except ModelsError as error:
            logger.error("head %s did not load: %s", name, error)
        except Exception:  # the head's state is `failed`; the others must still be loaded
            logger.exception("head %s did not load", name)

    def _remove(self, name: str) -> None:
        self._failures.pop(name, None)
        if name not in self._registry.declared and name in self._registry.catalog.models:
            self._unloaded[self._registry.catalog.model(name).trunk].pop(name, None)
            self._registry.remove(name)

    # -- descriptions ----------------------------------------------------------------------

    def _describe(self, name: str) -> HeadDescription | None:
        """A head's description, or None if the head does not exist."""
        if (fitting := self._fit_jobs.describe(name)) is not None:
            return fitting
        if name in self._failures:
            return UnservedHead(name=name, state=State.FAILED, reason=self._failures[name])
        return self._describe_model(name) if name in self._folder else None

    def _describe_model(self, name: str) -> ModelDescription | None:
        try:
            return self._registry.describe(name)
        except ModelNotFoundError:  # its file exists, but it is not or no longer declared
            return None


def _summary(head: HeadFile) -> str:
    """A head in one line."""
    if head.kind == LORA:
        return f"LoRA adapter on {head.trunk}"
    return f"{len(head.labels)} classes, {head.kind} head on {head.trunk}"
