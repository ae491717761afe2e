"""Labelled images, from folders named after classes, a CSV file, or a zip archive of folders."""

import csv
import io
import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from models.archives import count_members
from models.errors import InputError
from models.inputs.images import SUFFIXES

MAX_MEMBERS = 100_000
# Archives that expand by more than this factor are rejected: images are compressed already.
MAX_EXPANSION = 4
MARGIN_BYTES = 16 * 2**20
# What zipfile raises for damaged and unsupported archives.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError,
    OSError, ValueError, OverflowError, IndexError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled image.

    Args:
        name: the path relative to the folder, or in the archive.
        label: the name of its class.
        image: the encoded image, or the path of its file.
    """

    name: str
    label: str
    image: bytes | Path

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: its file cannot be read.
        """
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()


def read_examples(path: Path) -> list[Example]:
    """The examples in a folder of folders named after classes, or in a CSV file.

    Args:
        path: the folder, or a `.csv` file with the columns `path` (relative to it) and `label`.

    Raises:
        InputError: the path cannot be read, or has no examples.
    """
    examples = list(_of_csv(path) if path.suffix == ".csv" else _of_folder(path))
    if not examples:
        raise InputError(
            f"{path}: no image in a folder named after its class, and no row of path and label"
        )
    return examples


def read_archive(file: BinaryIO, max_bytes: int) -> list[Example]:
    """The examples in a zip archive of folders named after classes, which may be inside a folder.

    Args:
        max_bytes: the most bytes of all images together, which are held in memory.

    Raises:
        InputError: the archive is damaged, encrypted or too large, or an image is not in a folder.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _of_archive(archive, max_bytes)
    except DAMAGED as error:
        raise InputError(f"the archive cannot be read: {error}", field="archive") from error


def read_upload(content: bytes) -> list[Example]:
    """The examples in an archive that a caller sent. Raises as `read_archive`."""
    if count_members(content) > MAX_MEMBERS:
        raise InputError(f"the archive has more than {MAX_MEMBERS} files", field="archive")
    return read_archive(io.BytesIO(content), MAX_EXPANSION * len(content) + MARGIN_BYTES)


def check_classes(examples: Sequence[Example]) -> None:
    """Check that a head can be fitted.

    Raises:
        InputError: fewer than two classes, or a class with fewer than two images.
    """
    counts = Counter(example.label for example in examples)
    if len(counts) < 2:
        raise InputError(f"{len(counts)} class; a head needs at least two", field="labels")
    lone = sorted(label for label, count in counts.items() if count < 2)
    if lone:
        raise InputError(
            f"a single image of {', '.join(lone[:10])}; each class needs at least two, one to "
            "train on and one to hold out",
            field="labels",
        )


def split(labels: Sequence[str], holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on, and positions to hold out.

    Args:
        holdout: the share of each class that is held out. It is rounded to at least one example
            and at most all but one.
    """
    random = np.random.default_rng(seed)
    kept: list[int] = []
    held: list[int] = []
    by_label: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        by_label.setdefault(label, []).append(place)
    for _, positions in sorted(by_label.items()):
        random.shuffle(positions)
        count = min(len(positions) - 1, max(1, round(holdout * len(positions))))
        held += positions[:count]
        kept += positions[count:]
    return np.array(sorted(kept)), np.array(sorted(held))


def _of_folder(folder: Path) -> Iterator[Example]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and len(below.parts) > 1 and path.is_file():
            if not _is_text(below.parts[0]):
                raise InputError(f"the folder {below.parts[0]!r} has no name in UTF-8")
            yield Example(str(below), below.parts[0], path)


def _of_csv(path: Path) -> Iterator[Example]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"path", "label"} <= set(rows.fieldnames or ()):
                raise InputError(f"{path}: its first line must name the columns path and label")
            for row in rows:
                if row["path"] and row["label"]:
                    yield Example(row["path"], row["label"], path.parent / row["path"])
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file: {error}") from error


def _of_archive(archive: zipfile.ZipFile, max_bytes: int) -> list[Example]:
    members = [
        (PurePosixPath(item.filename), item)
        for item in archive.infolist()
        if not item.is_dir() and _is_image(PurePosixPath(item.filename))
    ]
    total = sum(item.file_size for _, item in members)
    if len(members) > MAX_MEMBERS or total > max_bytes:
        raise InputError(
            f"the archive holds {len(members)} images of {total} bytes; the limits are "
            f"{MAX_MEMBERS} and {max_bytes}",
            field="archive",
        )
    skip = 0
    while members and all(len(path.parts) > skip + 2 for path, _ in members):
        if len({path.parts[skip] for path, _ in members}) > 1:
            break
        skip += 1
    if outside := next((path for path, _ in members if len(path.parts) < skip + 2), None):
        raise InputError(f"{outside} is not in a folder named after its class", field="archive")
    examples = []
    for path, item in members:
        with archive.open(item) as file:
            content = file.read(item.file_size + 1)
        if len(content) != item.file_size:
            raise InputError(f"{path} is longer than the archive says", field="archive")
        examples.append(Example(str(path), path.parts[skip], content))
    if not examples:
        raise InputError(
            "the archive has no images; put them into folders named after classes", field="archive"
        )
    return examples


def _is_text(name: str) -> bool:
    """Whether it is Unicode text. Of a file's name, bytes that are not UTF-8 become surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden
