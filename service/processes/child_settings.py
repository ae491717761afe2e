"""What each supervised process gets of the machine and of the settings."""

import os
import subprocess
import sys
from typing import Any

from pydantic import SecretStr

from service.settings import Settings
from service.worker_options import usable_cores


def count_gpus() -> int:
    """GPUs that torch sees; asked in a process of its own, since torch is heavy."""
    program = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return int(found.stdout or 0)


def worker_settings(settings: Settings, index: int, count: int, gpus: int) -> Settings:
    """The settings of one of `count` local workers: a GPU if there are any, else its share of
    the cores, unless the settings say otherwise."""
    cores = max(1, usable_cores() // count)
    share: dict[str, Any] = {"metrics_port": 0}
    if gpus and settings.device == "auto":
        share["device"] = f"cuda:{index % gpus}"
    else:
        share["threads"] = settings.threads or cores
        share["decode_threads"] = settings.decode_threads or cores
    return Settings(**{**_given(settings), **share})


def child_environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with all settings that were given in it."""
    given = {f"VITRAIL_{name.upper()}": _text(value) for name, value in _given(settings).items()}
    return {**os.environ, **given}


def _given(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.model_fields_set}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
