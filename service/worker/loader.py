"""One thread for all that changes what is loaded, so that such changes come one after another."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from models.errors import ModelsError
from service.errors import ServiceError, UnavailableError, from_library
from service.worker.runner import use_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Loader:
    """Runs slow work of the registry off the event loop."""

    def __init__(self) -> None:
        alone = partial(use_threads, 1)
        self._pool = ThreadPoolExecutor(1, "loader", initializer=alone)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """The function's result; whatever goes wrong comes back as a ServiceError."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, function, *arguments)
        except ModelsError as error:
            raise from_library(error) from error
        except (ServiceError, asyncio.CancelledError):
            raise
        except Exception as error:
            logger.exception("%s%s failed", function.__name__, arguments[:1])
            raise UnavailableError("the model could not be loaded or unloaded") from error

    def close(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
