"""The settings of supervised processes, and their share of the machine."""

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import SecretStr

from service.settings import Settings
from service.worker_options import usable_cores


def find_gpus() -> list[str]:
    """The GPUs that torch finds, each by its name in CUDA_VISIBLE_DEVICES.

    torch runs in a subprocess, to keep it out of this one. Of the named parts of divided GPUs
    (MIG), a process sees only the first one, so all of them are taken to be there.
    """
    program = "import torch; print(torch.cuda.device_count())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    count = int(result.stdout or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names if count and names[0].startswith("MIG-") else names[:count]


def worker_settings(settings: Settings, count: int, gpu: str | None) -> Settings:
    """The settings of one of `count` local workers: an equal share of the cores, which decode
    images also for GPUs, and its GPU if there is one. Numbers of threads in the settings take
    precedence.

    Args:
        gpu: of `assigned_gpus`.
    """
    cores = max(1, usable_cores() // count)
    share: dict[str, Any] = {
        "metrics_port": 0,
        "drain_delay_s": 0.0,  # its gateways send its requests elsewhere
        "threads": settings.threads or cores,
        "decode_threads": settings.decode_threads or cores,
    }
    if gpu is not None:
        share["device"] = "cuda"
    return Settings(**{**_explicit(settings), **share})


def assigned_gpus(settings: Settings, count: int) -> Sequence[str | None]:
    """For each of `count` local workers the GPU that it sees, in turn; None for all if there is no
    GPU, or the settings name a device. A worker that sees only its own GPU uses no memory of
    others, and does not take another one when its own is gone."""
    gpus = find_gpus() if count and settings.device == "auto" else []
    return [gpus[number % len(gpus)] if gpus else None for number in range(count)]


def with_worker_token(settings: Settings) -> Settings:
    """The settings with a random credential between gateways and workers, unless they have one or
    name workers elsewhere, which would not know it."""
    if settings.worker_token is not None or settings.workers:
        return settings
    return Settings(**{**_explicit(settings), "worker_token": secrets.token_urlsafe(32)})


def child_environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with the settings as environment variables."""
    values = _explicit(settings)
    variables = {f"VITRAIL_{name.upper()}": _text(value) for name, value in values.items()}
    return {**os.environ, **variables}


def _explicit(settings: Settings) -> dict[str, Any]:
    """The settings that are not left at their defaults."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {name: value for name, value in values.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
