"""What a source of images is cut into: shards, each of which becomes one file of results.

A source is a folder or file of a local disk or an object store (any URI that pyarrow opens, such as
`s3://`): image files, Parquet files with a column of encoded images, or WebDataset tars.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow.parquet as pq
from pyarrow import fs

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
# The columns of a Parquet file: the first of each that it has.
IMAGE_COLUMNS = ("image", "bytes", "jpg", "png")
ID_COLUMNS = ("id", "path", "key")


class SourceFormatError(Exception):
    """The source cannot be read."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a source.

    Args:
        kind: image files, one row group of a Parquet file, or a tar.
        paths: its files, within the source's file system.
        version: the sizes and modification times of the files, so that changed ones are run again.
    """

    source: str
    kind: Literal["files", "parquet", "tar"]
    paths: tuple[str, ...]
    version: str
    row_group: int = 0

    @property
    def name(self) -> str:
        """A name for its results, which no other shard has."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:24]

    def to_json(self) -> str:
        """The shard as text, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Shard":
        """The shard that `to_json` returned."""
        members: dict[str, Any] = json.loads(text)
        return cls(**{**members, "paths": tuple(members["paths"])})


def list_shards(source: str, size: int) -> list[Shard]:
    """The shards of a source, in the order of its files' names.

    Args:
        size: the most image files in a shard.

    Raises:
        SourceFormatError: nothing is there, or nothing that can be read.
    """
    filesystem, root = open_source(source)
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise SourceFormatError(f"{source}: not found")
    files = [info]
    if info.type == fs.FileType.Directory:
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        files = sorted((f for f in found if f.is_file), key=lambda f: f.path)
    shards: list[Shard] = []
    for file in files:
        if file.extension == "parquet":
            groups = pq.ParquetFile(filesystem.open_input_file(file.path)).num_row_groups
            shards += [
                Shard(source, "parquet", (file.path,), _version([file]), n) for n in range(groups)
            ]
        elif file.extension == "tar":
            shards.append(Shard(source, "tar", (file.path,), _version([file])))
    images = [file for file in files if file.extension.lower() in SUFFIXES]
    for start in range(0, len(images), size):
        some = images[start : start + size]
        shards.append(Shard(source, "files", tuple(f.path for f in some), _version(some)))
    if not shards:
        raise SourceFormatError(f"{source}: no images, .parquet or .tar files")
    return shards


def read_shard(shard: Shard) -> Iterator[tuple[str, bytes | None]]:
    """The ids of a shard's images, each with the encoded image, or None if it cannot be read.

    Raises:
        SourceFormatError: a Parquet file without a column of images.
    """
    filesystem, _ = open_source(shard.source)
    match shard.kind:
        case "files":
            for path in shard.paths:
                try:
                    with filesystem.open_input_stream(path) as stream:
                        yield path, stream.read()
                except OSError:
                    yield path, None
        case "tar":
            [path] = shard.paths
            with (
                filesystem.open_input_stream(path) as stream,
                tarfile.open(fileobj=stream, mode="r|") as archive,
            ):
                for member in archive:
                    if member.isfile() and member.name.rpartition(".")[2].lower() in SUFFIXES:
                        content = archive.extractfile(member)
                        yield f"{path}/{member.name}", content.read() if content else None
        case "parquet":
            yield from _read_row_group(filesystem, shard)


def open_source(source: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it."""
    try:
        if "://" in source:
            filesystem, path = fs.FileSystem.from_uri(source)
            return filesystem, path
        return fs.LocalFileSystem(), source
    except (ValueError, OSError) as error:
        raise SourceFormatError(f"{source}: {error}") from error


def _read_row_group(filesystem: fs.FileSystem, shard: Shard) -> Iterator[tuple[str, bytes | None]]:
    [path] = shard.paths
    file = pq.ParquetFile(filesystem.open_input_file(path))
    names = file.schema_arrow.names
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise SourceFormatError(f"{path}: no column {', '.join(IMAGE_COLUMNS)}")
    key = next((name for name in ID_COLUMNS if name in names), None)
    columns = [image] if key is None else [image, key]
    table = file.read_row_group(shard.row_group, columns=columns)
    for row, cell in enumerate(table[image].to_pylist()):
        content = cell.get("bytes") if isinstance(cell, dict) else cell  # datasets' struct
        name = f"{path}#{shard.row_group}.{row}" if key is None else str(table[key][row].as_py())
        yield name, content


def _version(files: Sequence[fs.FileInfo]) -> str:
    return hashlib.sha256(repr([(f.size, f.mtime_ns) for f in files]).encode()).hexdigest()[:16]
