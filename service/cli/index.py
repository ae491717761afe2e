"""Files of a folder's embeddings, written in parts so that writing can be interrupted and resumed.

`OUTPUT.parts/` holds the parts meanwhile: parquet files of rows in order, and `made_by.json`, which
names the model. A part is renamed into place once it is complete. Images that failed are in no
part, so that a run that resumes tries them again.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PART_ROWS = 500
KEY = b"vitrail"
SCHEMA = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32()))])


class IndexFileError(Exception):
    """An index that cannot be read or continued. The message says what to do."""


@dataclass(frozen=True, slots=True)
class MadeBy:
    """The model whose embeddings an index holds, and the `pooling` option if one was set."""

    model: str
    model_digest: str
    preprocess_digest: str
    pooling: str | None = None


class IndexWriter:
    """Writes rows to parts, which `finish` joins to one file."""

    def __init__(self, output: Path) -> None:
        """
        Args:
            output: a `.parquet` or `.npy` file.

        Raises:
            IndexFileError: another kind of file.
        """
        if output.suffix not in (".parquet", ".npy"):
            raise IndexFileError(f"{output}: embeddings are written to .parquet or .npy files")
        self._output = output
        self._parts = output.with_name(output.name + ".parts")
        self._rows: list[dict[str, Any]] = []
        self._made_by: MadeBy | None = None
        if (note := self._parts / "made_by.json").is_file():
            self._made_by = MadeBy(**json.loads(note.read_text(encoding="utf-8")))

    def done(self) -> set[str]:
        """The paths in the parts of an earlier run."""
        return {path for part in self._files() for path in part.column("path").to_pylist()}

    def add(self, path: str, embedding: list[float]) -> None:
        """Add an image's embedding."""
        self._rows.append({"path": path, "embedding": embedding})
        if len(self._rows) >= PART_ROWS:
            self.flush()

    def check(self, made_by: MadeBy) -> None:
        """Check that all embeddings come from the same model. The first call stores it.

        Raises:
            IndexFileError: earlier embeddings come from another model.
        """
        if self._made_by is None:
            self._made_by = made_by
            self._parts.mkdir(parents=True, exist_ok=True)
            note = self._parts / "made_by.json"
            note.write_text(json.dumps(asdict(made_by)), encoding="utf-8")
        elif self._made_by != made_by:
            raise IndexFileError(
                f"{self._output} was begun with model {self._made_by.model} "
                f"({self._made_by.model_digest[:19]}...), but the server now uses "
                f"{made_by.model} ({made_by.model_digest[:19]}...); remove {self._parts} to start "
                "over"
            )

    def flush(self) -> None:
        """Write the rows since the last part as a new part."""
        if not self._rows:
            return
        self._parts.mkdir(parents=True, exist_ok=True)
        number = len(list(self._parts.glob("*.parquet")))
        table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
        unfinished = self._parts / "unfinished"
        pq.write_table(table, unfinished)
        unfinished.rename(self._parts / f"{number:06}.parquet")
        self._rows = []

    def finish(self) -> int:
        """Join all parts to the output, and remove them. Returns the number of rows."""
        self.flush()
        made_by = json.dumps(asdict(self._made_by)) if self._made_by else "{}"
        unfinished = self._output.with_name(self._output.name + ".unfinished")
        if self._output.suffix == ".npy":
            table = unfinished.with_suffix(".parquet")
            rows = self._write_parquet(table, made_by)
            self._write_npy(table, unfinished)
            table.unlink()
            self._output.with_suffix(".made_by.json").write_text(made_by, encoding="utf-8")
        else:
            rows = self._write_parquet(unfinished, made_by)
        unfinished.rename(self._output)
        shutil.rmtree(self._parts, ignore_errors=True)
        return rows

    def _files(self) -> Iterator[pa.Table]:
        for path in sorted(self._parts.glob("*.parquet")):
            part = pq.read_table(path)  # earlier versions have failed images in it, with an error
            yield part.filter(pc.field("embedding").is_valid()).select(SCHEMA.names)

    def _write_parquet(self, target: Path, made_by: str) -> int:
        rows = 0
        with pq.ParquetWriter(target, SCHEMA.with_metadata({KEY: made_by})) as writer:
            for part in self._files():
                writer.write_table(part.cast(SCHEMA))
                rows += part.num_rows
        return rows

    def _write_npy(self, table: Path, target: Path) -> None:
        """Copy the vectors of a parquet file, in batches, and write the paths beside the output."""
        source = pq.ParquetFile(table)
        place = 0
        vectors = np.empty((0, 0), np.float32)
        with self._output.with_suffix(".paths.txt").open("w", encoding="utf-8") as paths:
            for batch in source.iter_batches(PART_ROWS):
                block = np.array(batch.column("embedding").to_pylist(), np.float32)
                if place == 0:
                    shape = (source.metadata.num_rows, block.shape[1])
                    vectors = np.lib.format.open_memmap(target, "w+", np.float32, shape)
                vectors[place : place + len(block)] = block
                place += len(block)
                paths.writelines(f"{path}\n" for path in batch.column("path").to_pylist())
        if place == 0:
            with target.open("wb") as file:
                np.save(file, vectors)


@dataclass(frozen=True, slots=True)
class Index:
    """An index as `vitrail embed` writes it: (N, D) float32 vectors, their paths, their model."""

    paths: list[str]
    vectors: np.ndarray
    made_by: MadeBy


def read_index(path: Path) -> Index:
    """Read a `.parquet` or `.npy` file that `IndexWriter` wrote.

    Raises:
        IndexFileError: it is not an index, or the files beside it are missing.
    """
    try:
        if path.suffix == ".npy":
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            names = path.with_suffix(".paths.txt").read_text(encoding="utf-8").splitlines()
            note = path.with_suffix(".made_by.json").read_text(encoding="utf-8")
        else:
            table = pq.read_table(path)
            names = table.column("path").to_pylist()
            vectors = np.array(table.column("embedding").to_pylist(), np.float32)
            note = (table.schema.metadata or {})[KEY].decode()
        return Index(names, vectors, MadeBy(**json.loads(note)))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise IndexFileError(
            f"{path} is not an index written by `vitrail embed --output`: {error}"
        ) from error
