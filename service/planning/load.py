"""What is asked of trunks, and what their passes cost."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from models.errors import CatalogError

MAX_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class TrunkLoad:
    """Images that arrive for one trunk, at random times and independently of each other.

    Args:
        rate: images per second.
        pass_s: seconds of a pass by the images in it, as measured for some sizes.
        max_batch_size: the most images in a pass.
        memory: bytes on the device.
        heads: how many an image may be for, each as likely as the others.
        head_s: seconds that a pass takes longer for each further head in it.
    """

    name: str
    rate: float
    pass_s: Mapping[int, float]
    max_batch_size: int = MAX_BATCH_SIZE
    memory: int = 0
    heads: int = 1
    head_s: float = 0.0

    def seconds(self) -> np.ndarray:
        """(max_batch_size + 1,) seconds of passes of 0, 1, ... images, each for another head as far
        as there are heads. Between the measured sizes they lie on a line, and beyond them an image
        costs what it does in the nearest one."""
        sizes = sorted(self.pass_s)
        times = [self.pass_s[size] for size in sizes]
        images = np.arange(self.max_batch_size + 1)
        seconds = np.interp(images, sizes, times)
        beyond = images > sizes[-1]
        seconds[beyond] = images[beyond] * times[-1] / sizes[-1]
        seconds += self.head_s * np.maximum(0, np.minimum(images, self.heads) - 1)
        seconds[0] = 0.0
        return seconds

    @property
    def utilization(self) -> float:
        """The share of one lane's time that full passes take; 1 or more cannot be served."""
        return float(self.rate * self.seconds()[-1] / self.max_batch_size)

    def part(self, devices: int) -> "TrunkLoad":
        """What each of several devices gets."""
        return replace(self, rate=self.rate / devices)


class _Trunk(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rate: float = Field(gt=0, le=1e7)
    pass_ms: dict[str, float] = Field(min_length=1)
    max_batch_size: int = Field(MAX_BATCH_SIZE, ge=1, le=256)
    memory_mb: float = Field(0.0, ge=0)

    @field_validator("pass_ms")
    @classmethod
    def _check(cls, pass_ms: dict[str, float]) -> dict[str, float]:
        for size, milliseconds in pass_ms.items():
            if not (size.isdecimal() and 1 <= int(size) <= 256 and 0 < milliseconds < 1e6):
                raise ValueError(
                    "has milliseconds by the number of images, as in {1 = 9.5, 8 = 31}"
                )
        return pass_ms


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    trunks: dict[str, _Trunk] = Field(min_length=1, max_length=10_000)


def read_loads(path: Path) -> list[TrunkLoad]:
    """Read `[trunks.NAME]` tables with `rate`, `pass_ms`, `max_batch_size` and `memory_mb`.

    Raises:
        CatalogError: the file cannot be read, or has other content.
    """
    try:
        content = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CatalogError(f"{path}: {place}: {first['msg'].lower()}") from error
    return [
        TrunkLoad(
            name,
            trunk.rate,
            {int(size): ms / 1e3 for size, ms in trunk.pass_ms.items()},
            trunk.max_batch_size,
            int(trunk.memory_mb * 1e6),
        )
        for name, trunk in content.trunks.items()
    ]
