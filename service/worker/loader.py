"""The one thread that loads and unloads models, so that such changes never overlap."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from models.errors import ModelsError
from models.registry import Registry
from models.trunks.device_errors import is_lost
from service.allocator import return_freed_memory
from service.errors import (
    DISK_FULL,
    InsufficientStorageError,
    ServiceError,
    UnavailableError,
    from_library,
)
from service.garbage import full_collections, leave_out_old_objects, look_at_all_objects
from service.worker.device_loss import exit_for_restart
from service.worker.runner import use_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Loader:
    """Runs changes of the registry off the event loop, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        single_threaded = partial(use_threads, 1)
        self._pool = ThreadPoolExecutor(1, "loader", initializer=single_threaded)
        self._unfinished: set[Future[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether a function runs or waits. It may hold the interpreter's lock for seconds."""
        return bool(self._unfinished)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """The result of `function(*arguments)`.

        Raises:
            ServiceError: the function failed. An unexpected error is logged and becomes an
                UnavailableError.
        """
        try:
            future = self._pool.submit(function, *arguments)
            self._unfinished.add(future)
            future.add_done_callback(self._unfinished.discard)
            return await asyncio.wrap_future(future)
        except ModelsError as error:
            raise from_library(error) from error
        except (ServiceError, asyncio.CancelledError):
            raise
        except Exception as error:
            if is_lost(error, self._device):
                exit_for_restart(error)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                logger.error("%s: %s", function.__name__, error)
                raise InsufficientStorageError("the server's disk is full") from error
            logger.exception("%s%s failed", function.__name__, arguments[:1])
            raise UnavailableError("the model could not be loaded or unloaded") from error

    def close(self) -> None:
        """Cancel what has not started. Does not wait for what is running."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def load_model(name: str, registry: Registry) -> None:
    """Load a model, and return the memory that only its load needed."""
    try:
        registry.load(name)
    finally:
        leave_out_old_objects()
        return_freed_memory()


def unload_models(names: Sequence[str], registry: Registry) -> None:
    """Unload models, and return their memory."""
    look_at_all_objects()
    before = full_collections()
    try:
        for name in names:
            registry.unload(name)
    finally:  # the registry has collected if it dropped a trunk
        leave_out_old_objects(collect=full_collections() == before)
        return_freed_memory()
