"""The folder of heads: what lies there is served, whoever put it there, also after a restart."""

import asyncio
import logging
import re
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.catalog import ModelEntry
from models.description import HeadDescription, ModelDescription, State, UnservedHead
from models.errors import CheckpointError, ModelNotFoundError, ModelsError
from models.heads.files import HeadFile, decode_head, encode_head, read_head, write_whole
from models.heads.registry import create_head
from models.registry import Registry
from service.backend import PARTS
from service.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
    UnavailableError,
)
from service.types import FitRequest, HeadUpload
from service.worker.fit_jobs import FitJobs

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUFFIX = ".safetensors"
INTERVAL_S = 1.0
MAX_HEADS = 4096

InLoader = Callable[..., Awaitable[Any]]


class HeadStore:
    """Keeps the registry as the folder is. All that changes either runs in the loader's thread, so
    that nothing of it needs a lock; several processes may share the folder."""

    def __init__(
        self, registry: Registry, folder: Path, fits: FitJobs, in_loader: InLoader
    ) -> None:
        self._registry = registry
        self._folder = folder
        self._fit_jobs = fits
        self._in_loader = in_loader
        self._own = frozenset(registry.catalog.models)
        self._seen: dict[str, tuple[int, int]] = {}
        self._unloaded: set[str] = set()
        self._broken: dict[str, str] = {}
        self.settled = False

    async def run(self) -> None:
        """Follow the folder until cancelled."""
        while True:
            try:
                await self._in_loader(self._sync)
                self.settled = True
            except Exception:
                logger.exception("the folder of heads cannot be read")
            await asyncio.sleep(INTERVAL_S)

    # -- Heads -----------------------------------------------------------------------------

    async def all(self) -> Sequence[HeadDescription]:
        served = self._registry.describe_all()
        names = dict.fromkeys([*self._seen, *self._fit_jobs.names()])
        heads = [self._describe(name, served.get) for name in names]
        return [head for head in heads if head is not None]

    async def get(self, name: str) -> HeadDescription:
        head = self._describe(name, self._describe_model)
        if head is None:
            raise NotFoundError(f"no head {name!r}", field="name")
        return head

    async def put(self, upload: HeadUpload) -> HeadDescription:
        await self._in_loader(self._put, upload)
        return await self.get(upload.name)

    async def fit(self, request: FitRequest) -> HeadDescription:
        def accept() -> None:
            self._check_name(request.name, request.trunk, request.replace)
            self._fit_jobs.accept(request)

        await self._in_loader(accept)
        return await self.get(request.name)

    async def delete(self, name: str) -> None:
        await self._in_loader(self._delete, name)

    async def read(self, name: str, part: str) -> bytes:
        if part not in PARTS or not NAME.fullmatch(name):
            raise NotFoundError(f"no {part!r} of a head; there are {', '.join(PARTS)}")
        path = self._path(name) if part == PARTS[0] else self._report(name) / part
        try:
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise NotFoundError(f"the head {name!r} has no {part}", field="name") from error

    # -- in the loader's thread ------------------------------------------------------------

    def _put(self, upload: HeadUpload) -> None:
        try:
            head = decode_head(upload.content)
            if upload.trunk is not None:
                head = replace(head, trunk=upload.trunk)
            self._check_name(upload.name, head.trunk, upload.replace)
            self._check_fits(head)
        except CheckpointError as error:
            raise InvalidInputError(str(error), field="file") from error
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._report(upload.name), ignore_errors=True)
        write_whole(self._path(upload.name), encode_head(head))
        self._sync()

    def _check_name(self, name: str, trunk: str, may_replace: bool) -> None:
        if not NAME.fullmatch(name):
            raise InvalidInputError(
                f"name is {name!r}; it can have letters, digits and . _ - , 100 at most",
                field="name",
            )
        if name in self._own:
            raise ConflictError(f"the catalog has a model {name!r}", field="name")
        if self._path(name).exists() and not may_replace:
            raise ConflictError(
                f"there is a head {name!r}; say replace, or delete it", field="name"
            )
        old = self._registry.catalog.models.get(name)
        if old is not None and old.trunk != trunk:
            raise ConflictError(f"{name!r} stands on {old.trunk!r}; delete it first", field="name")
        if self._fit_jobs.is_busy(name):
            raise ConflictError(f"a head {name!r} is being fitted", field="name")
        if len(self._seen) >= MAX_HEADS:
            raise PayloadTooLargeError(f"there are {len(self._seen)} heads, as many as can be")

    def _check_fits(self, head: HeadFile) -> None:
        """Try the head on its trunk, which must be loaded."""
        if head.trunk not in self._registry.catalog.trunks:
            some = ", ".join(self._registry.catalog.trunks)
            raise InvalidInputError(
                f"the head is for the trunk {head.trunk!r}; the catalog has {some}", field="trunk"
            )
        loaded = self._registry.loaded_trunk(head.trunk)
        if loaded is None:
            raise UnavailableError(
                f"the trunk {head.trunk!r} is not loaded; load a model that stands on it",
                retry_after_s=2,
            )
        trunk = loaded.trunk
        head.check_trunk(trunk.digest, trunk.preprocess.digest, loaded.source)
        try:
            create_head(head.kind, loaded.trunk, head.labels, head.state)
        except ModelsError:
            raise
        except Exception as error:  # whatever a stranger's tensors make torch say
            raise CheckpointError(f"the head cannot be built: {error}") from error

    def _delete(self, name: str) -> None:
        fitting = self._fit_jobs.cancel(name)
        if name not in self._seen and not fitting:
            what = "is of the catalog, not a head" if name in self._own else "does not exist"
            raise NotFoundError(f"{name!r} {what}", field="name")
        self._path(name).unlink(missing_ok=True)
        shutil.rmtree(self._report(name), ignore_errors=True)
        self._sync()

    def _sync(self) -> None:
        found = self._scan()
        for name in self._seen.keys() - found:
            self._forget(name)
        for name, stamp in found.items():
            if self._seen.get(name) != stamp:
                self._seen[name] = stamp
                self._take(name)
            elif name in self._unloaded:
                self._load(name)
        self._fit_jobs.poll()

    def _scan(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                status = path.stat()
            except OSError:  # gone since
                continue
            if NAME.fullmatch(path.stem):
                found[path.stem] = (status.st_mtime_ns, status.st_size)
        return found

    def _take(self, name: str) -> None:
        """Declare what a new or changed file holds, and load it if its trunk is loaded."""
        try:
            self._declare(name)
        except ModelsError as error:
            self._broken[name] = str(error)
            logger.warning("head %s: %s", name, error)
        else:
            self._broken.pop(name, None)
            self._unloaded.add(name)
            self._load(name)
        # only now, or whoever asks meanwhile is told that the head does not exist
        self._fit_jobs.forget(name)

    def _declare(self, name: str) -> None:
        if name in self._own:
            raise CheckpointError("the catalog has a model of that name")
        head = read_head(self._path(name))
        described = f"{len(head.labels)} classes, {head.kind} head on {head.trunk}"
        self._registry.add(
            ModelEntry(
                name=name,
                trunk=head.trunk,
                task=head.task,
                head=f"file:{self._path(name).absolute()}",
                description=described,
            )
        )

    def _load(self, name: str) -> None:
        entry = self._registry.catalog.model(name)
        if self._registry.loaded_trunk(entry.trunk) is None:
            return
        self._unloaded.discard(name)
        try:
            self._registry.load(name)
        except ModelsError as error:
            logger.error("head %s did not load: %s", name, error)
        except Exception:  # its state tells; the other heads are not to suffer
            logger.exception("head %s did not load", name)

    def _forget(self, name: str) -> None:
        del self._seen[name]
        self._unloaded.discard(name)
        self._broken.pop(name, None)
        if name not in self._own and name in self._registry.catalog.models:
            self._registry.remove(name)

    # -- descriptions ----------------------------------------------------------------------

    def _describe(
        self, name: str, served: Callable[[str], ModelDescription | None]
    ) -> HeadDescription | None:
        """A head's description, or None if there is no such head."""
        if (fitting := self._fit_jobs.describe(name)) is not None:
            return fitting
        if name in self._broken:
            return UnservedHead(name=name, state=State.FAILED, reason=self._broken[name])
        return served(name) if name in self._seen else None

    def _describe_model(self, name: str) -> ModelDescription | None:
        try:
            return self._registry.describe(name)
        except ModelNotFoundError:  # its file exists, and is not declared yet or not any more
            return None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _report(self, name: str) -> Path:
        return self._folder / f"{name}.report"
