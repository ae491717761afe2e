"""Ends a process that has lost its device."""

import logging
import os
from typing import NoReturn

import torch

from models.errors import CatalogError
from models.trunks.devices import resolve_device
from service.exit_status import DEVICE_LOST

logger = logging.getLogger(__name__)


def exit_for_restart(error: BaseException) -> NoReturn:
    """End the process at once, so that its supervisor starts a new one with a new CUDA context.

    Requests in flight are not answered: a gateway sends them to another worker. The interpreter is
    not shut down, because destructors of CUDA objects would fail or hang.
    """
    logger.critical("the device is lost; exiting with status %d: %s", DEVICE_LOST, error)
    os._exit(DEVICE_LOST)


def require_gpu() -> None:
    """End the process as one that has lost its device, unless its GPU can be used. For a worker
    that was given one by its supervisor: no setting is wrong, and the GPU may come back."""
    try:
        torch.zeros(1, device=resolve_device("cuda"))
    except (CatalogError, RuntimeError) as error:
        exit_for_restart(error)
