"""The settings of supervised processes, and their share of the machine."""

import os
import secrets
import subprocess
import sys
from typing import Any

from pydantic import SecretStr

from service.settings import Settings
from service.worker_options import usable_cores


def count_gpus() -> int:
    """The number of GPUs that torch finds. Runs in a subprocess, to keep torch out of this one."""
    program = "import torch; print(torch.cuda.device_count())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return int(result.stdout or 0)


def worker_settings(settings: Settings, index: int, count: int, gpus: int) -> Settings:
    """The settings of one of `count` local workers: an equal share of the cores, which decode
    images also for GPUs, and a GPU if there is one. A device or numbers of threads in the settings
    take precedence."""
    cores = max(1, usable_cores() // count)
    share: dict[str, Any] = {
        "metrics_port": 0,
        "drain_delay_s": 0.0,  # its gateways send its requests elsewhere
        "threads": settings.threads or cores,
        "decode_threads": settings.decode_threads or cores,
    }
    if gpus and settings.device == "auto":
        share["device"] = f"cuda:{index % gpus}"
    return Settings(**{**_explicit(settings), **share})


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
