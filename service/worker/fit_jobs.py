"""Fits heads in the background, one at a time, with lower priority than all requests."""

import io
import json
import logging
import os
import threading
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from models.description import UnservedHead
from models.errors import InputError, ModelsError
from models.fitting.dataset import Progress
from models.fitting.examples import check_classes, read_archive, read_upload
from models.fitting.features import ReadFeatures
from models.fitting.fit import Fitted, create_reader, fit
from models.fitting.options import FitOptions
from models.fitting.report import write_report
from models.heads.files import save_head, write_whole
from models.inference import HeadCall
from models.inputs.images import ImageLimits
from models.registry import Registry
from models.started_pass import Row
from service.errors import (
    DISK_FULL,
    InvalidInputError,
    QueueFullError,
    UnavailableError,
    from_library,
)
from service.metrics import Metrics
from service.types import FitRequest
from service.worker.batch_queue import Entry
from service.worker.batcher import Batcher
from service.worker.fit_job import JOB, SUFFIX, FitJob, claim
from service.worker.places import QueueFull
from service.worker.runner import Item, use_threads
from service.worker.trunk_keys import key_of, name_of

logger = logging.getLogger(__name__)

# Most fits that wait or run, over all processes that share the folder. Each keeps its archive on
# disk and a lock's file descriptor.
MAX_FITS = 16
# Most failed fits whose reasons are kept; the oldest are forgotten.
MAX_FAILED = 100
FULL_RETRY_AFTER_S = 30.0


class CancelledError(Exception):
    """The job was cancelled, or the server is shutting down."""


class FitJobs:
    """Jobs, each a file in the folder of heads until it ends, so that a restart resumes it.

    All methods but `close` are called from the loader's thread. Training has its own thread, of the
    lowest priority; its trunk passes go through the trunk's queue as bulk.
    """

    def __init__(
        self, registry: Registry, folder: Path, batcher: Batcher, limits: ImageLimits,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._folder = folder
        self._batcher = batcher
        self._limits = limits
        self._metrics = metrics
        self._jobs: dict[str, FitJob] = {}
        self._pool = ThreadPoolExecutor(1, "fit", initializer=_lower_priority)
        self._closing = threading.Event()

    def names(self) -> Sequence[str]:
        """The heads that wait or are being fitted, and those whose fit failed."""
        return list(self._jobs)

    def finished(self) -> Sequence[str]:
        """The heads whose fit has ended, in success or not."""
        return [name for name, job in list(self._jobs.items()) if job.finished]

    def trunks(self) -> set[str]:
        """The trunks that heads wait to be fitted on, or are being fitted on."""
        jobs = [job for job in list(self._jobs.values()) if not job.finished]
        return {str(job.request.get("trunk")) for job in jobs}

    def is_busy(self, name: str) -> bool:
        """Whether a head of that name waits to be fitted, or is being fitted."""
        return (job := self._jobs.get(name)) is not None and not job.finished

    def accept(self, request: FitRequest) -> None:
        """Check a request, without running a pass, and store it as a job.

        Raises:
            ServiceError: it cannot succeed, the trunk is not loaded, or too many fits wait.
            OSError: the disk is full.
        """
        if len(list(self._folder.glob(f"*{SUFFIX}"))) >= MAX_FITS:
            detail = f"{MAX_FITS} heads are being fitted or wait for it; try again later"
            raise QueueFullError(detail, retry_after_s=FULL_RETRY_AFTER_S)
        trunk = self._registry.loaded_trunk(request.trunk)
        if request.trunk not in self._registry.catalog.trunks:
            names = ", ".join(self._registry.catalog.trunks)
            raise InvalidInputError(f"no trunk {request.trunk!r}; choose {names}", field="trunk")
        if trunk is None:
            raise UnavailableError(
                f"the trunk {request.trunk!r} is not loaded; load a model that uses it",
                retry_after_s=2,
            )
        try:
            options = FitOptions(**request.options).check()
            create_reader(trunk.trunk, request.trunk, options)
            check_classes(read_upload(request.archive))
        except TypeError as error:
            names = ", ".join(FitOptions.__dataclass_fields__)
            raise InvalidInputError(f"unknown option; the options are {names}") from error
        except ModelsError as error:
            raise InvalidInputError(str(error), field=getattr(error, "field", None)) from error
        job = {"name": request.name, "trunk": request.trunk, "options": asdict(options)}
        content = io.BytesIO(request.archive)
        with zipfile.ZipFile(content, "a") as archive:
            archive.writestr(JOB, json.dumps(job))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._jobs.pop(request.name, None)
        write_whole(self._path(request.name), content.getvalue())
        self.poll()

    def cancel(self, name: str) -> bool:
        """Cancel a job. Returns whether there was one."""
        if (job := self._jobs.pop(name, None)) is None:
            return False
        job.cancelled.set()
        job.path.unlink(missing_ok=True)
        return True

    def forget(self, name: str) -> None:
        """Discard a finished job's status once a head with its name exists."""
        if (job := self._jobs.get(name)) is not None and job.finished:
            del self._jobs[name]

    def poll(self) -> None:
        """Start jobs that no process is working on, and discard those whose head is served."""
        for name, job in list(self._jobs.items()):
            if job.finished and not job.reason and name in self._registry.catalog.models:
                del self._jobs[name]
        failed = [name for name, job in self._jobs.items() if job.finished and job.reason]
        for name in failed[:-MAX_FAILED]:
            del self._jobs[name]
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            if not self.is_busy(name) and not self._closing.is_set():
                self._start(name, path)

    def describe(self, name: str) -> UnservedHead | None:
        """A job's head, or None if no job has that name."""
        if (job := self._jobs.get(name)) is None:
            return None
        return UnservedHead(
            name=name,
            state=job.state,
            reason=job.reason or None,
            progress=None if job.progress is None else asdict(job.progress),
            trunk=job.request.get("trunk"),
            task="classify",
        )

    def close(self) -> None:
        """Stop. The next process resumes the jobs that have not ended."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _start(self, name: str, path: Path) -> None:
        if (job := claim(name, path)) is not None:
            self._jobs[name] = job
            self._pool.submit(self._work, job)

    # -- in the training's thread ----------------------------------------------------------

    def _work(self, job: FitJob) -> None:
        outcome = "error"
        try:
            if job.cancelled.is_set():
                raise CancelledError
            job.state = "fitting"
            started = time.monotonic()
            fitted = self._fit(job)
            self._check(job)
            write_report(fitted.report, self._folder / f"{job.name}.report")
            self._check(job)  # again, since drawing the report takes a while
            save_head(fitted.head, self._folder / f"{job.name}.safetensors")
            job.path.unlink(missing_ok=True)
            outcome = "ok"
            logger.info("head %s fitted in %.1f s", job.name, time.monotonic() - started)
        except CancelledError:
            outcome = "cancelled"
        except ModelsError as error:
            outcome = "invalid" if isinstance(error, InputError) else "error"
            self._fail(job, from_library(error).detail)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                logger.error("fitting %s: %s", job.name, error)
                self._fail(job, "the server's disk is full")
            else:
                logger.exception("fitting %s failed", job.name)
                self._fail(job, "internal error; see the server's log")
        finally:
            job.finished = True
            if job.reason:  # last: who sees this state may ask for another head of that name
                job.state = "failed"
            job.release(ended=not self._closing.is_set())
            self._metrics.fits.labels(outcome).inc()

    def _fail(self, job: FitJob, reason: str) -> None:
        job.reason = reason
        if not job.cancelled.is_set():  # if cancelled, the file may belong to a newer job
            job.path.unlink(missing_ok=True)

    def _fit(self, job: FitJob) -> Fitted:
        request = job.request
        loaded = self._wait_for_trunk(job, request["trunk"])
        with zipfile.ZipFile(job.path) as archive:
            total = sum(item.file_size for item in archive.infolist())
        with job.path.open("rb") as file:
            examples = read_archive(file, total)

        def note(progress: Progress) -> None:
            self._check(job)
            job.progress = progress

        with self._registry.store.temporary_folder() as folder:
            return fit(
                examples,
                loaded.trunk,
                request["trunk"],
                FitOptions(**request["options"]),
                folder,
                run=lambda pixels, head: self._run(job, key_of(loaded.trunk), pixels, head),
                progress=note,
                trunk_source=loaded.source,
                limits=self._limits,
            )

    def _wait_for_trunk(self, job: FitJob, name: str) -> Any:
        """The trunk, once it is loaded, which takes a while after a restart."""
        while (loaded := self._registry.loaded_trunk(name)) is None:
            self._check(job)
            time.sleep(0.1)
        return loaded

    def _run(self, job: FitJob, trunk: str, pixels_BCHW: Tensor, head: ReadFeatures) -> list[Row]:
        items = [Item.awaited(trunk, pixels, (HeadCall(head),)) for pixels in pixels_BCHW]
        for item, _ in items:
            self._admit(job, trunk)
            self._batcher.put(trunk, [Entry(item, job.name, bulk=True, client=job.name)])
        rows: list[Row] = []
        for _, future in items:
            [row] = future.result().rows
            if isinstance(row, Exception):
                raise row
            rows.append(row)
        return rows

    def _admit(self, job: FitJob, trunk: str) -> None:
        while True:
            self._check(job)
            try:
                return self._batcher.admit(trunk, 1, job.name, bulk=True)
            except QueueFull:
                time.sleep(0.05)
            except KeyError as error:
                reason = f"the trunk {name_of(trunk)!r} was unloaded or replaced"
                raise InputError(reason, field="trunk") from error

    def _check(self, job: FitJob) -> None:
        if job.cancelled.is_set() or self._closing.is_set():
            raise CancelledError


def _lower_priority() -> None:
    """Give the calling thread one core and the lowest scheduling priority."""
    use_threads(1)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
