"""Ends a process that has lost its device."""

import logging
import os
from typing import NoReturn

from service.exit_status import DEVICE_LOST

logger = logging.getLogger(__name__)


def exit_for_restart(error: BaseException) -> NoReturn:
    """End the process at once, so that its supervisor starts a new one with a new CUDA context.

    Requests in flight are not answered: a gateway sends them to another worker. The interpreter is
    not shut down, because destructors of CUDA objects would fail or hang.
    """
    logger.critical("the device is lost; exiting with status %d: %s", DEVICE_LOST, error)
    os._exit(DEVICE_LOST)
