"""What all servers of a comparison are given: photos, weights, and the answers expected of them.

`benchmarks/prepare.py` makes the files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workload:
    """The files of one kind of photos.

    Args:
        folder: absolute, since servers have working folders of their own.
        kind: `small`, `medium` or `large`, see `benchmarks/photos.py`.
    """

    folder: Path
    kind: str

    @property
    def catalog(self) -> Path:
        """Vitrail's catalog of the models."""
        return self.folder / "catalog.toml"

    @property
    def photo_folder(self) -> Path:
        """JPEG files, `00.jpg` and so on."""
        return self.folder / "photos" / self.kind

    def weights(self, model: str) -> Path:
        """The safetensors file of a model, with timm's names."""
        return self.folder / "weights" / f"{model}.safetensors"

    def expected_path(self, model: str) -> Path:
        """The file that `expected` reads."""
        return self.folder / "expected" / f"{model}-{self.kind}.json"

    def photos(self) -> list[bytes]:
        """The encoded photos."""
        return [path.read_bytes() for path in sorted(self.photo_folder.glob("*.jpg"))]

    def expected(self, model: str) -> list[list[int]]:
        """For each photo the five best classes by plain timm."""
        classes: list[list[int]] = json.loads(self.expected_path(model).read_text())
        return classes


def grouped(items: Sequence[T], count: int) -> list[list[T]]:
    """As many groups as items, of `count` items each, that begin at each item in turn."""
    return [
        [items[(start + offset) % len(items)] for offset in range(count)]
        for start in range(len(items))
    ]
