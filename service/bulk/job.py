"""What a bulk run does, and the folder that its results are written to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from models.tasks.base import Output
from models.tasks.table import tasks
from service.bulk.shards import Shard, SourceFormatError, open_source
from service.errors import InvalidInputError
from service.types import ImageResult, ModelUsed

# Readers of Parquet folders leave out files whose names begin so.
MANIFEST = "_job.json"
# Its name in folders of former versions.
FORMER_MANIFEST = "job.json"
# The table that `write_lance` makes, and the column of vectors in it.
LANCE = "results"
EMBEDDING = "embedding"
NUMBERS = {
    "FP32": pa.float32(),
    "INT64": pa.int64(),
    "INT32": pa.int32(),
    "UINT8": pa.uint8(),
    "BOOL": pa.bool_(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A task to run on a source's images.

    Args:
        model: its name in the catalog.
        options: as `Options.head_options` returns them.
        output: the folder of the results, a path or URI.
    """

    task: str
    model: str
    source: str
    output: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Results:
    """The folder of a job's results: a Parquet file for each shard that is done.

    A file appears whole or not at all, under its shard's name. So a shard that is run twice, since
    its worker was lost, has its rows once.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._filesystem, self._root = open_source(job.output)

    def open(self) -> set[str]:
        """Create the folder, or continue in it. Returns the names of the shards that are done.

        Raises:
            SourceFormatError: the folder holds the results of another job.
        """
        self._filesystem.create_dir(self._root, recursive=True)
        path, former = f"{self._root}/{MANIFEST}", f"{self._root}/{FORMER_MANIFEST}"
        if found := next(filter(self._is_file, (path, former)), None):
            with self._filesystem.open_input_stream(found) as stream:
                other = json.loads(stream.read())
            if other != json.loads(json.dumps(asdict(self._job))):
                raise SourceFormatError(f"{self._job.output} holds the results of another job")
            if found == former:
                self._filesystem.move(former, path)
        else:
            partial = f"{self._root}/.{MANIFEST}.partial"
            with self._filesystem.open_output_stream(partial) as stream:
                stream.write(json.dumps(asdict(self._job)).encode())
            self._filesystem.move(partial, path)
        return {Path(path).stem for path in self._parts()}

    def write(self, shard: Shard, rows: Sequence[tuple[str, ImageResult]], used: ModelUsed) -> int:
        """Write a shard's results. Returns the number of images that failed."""
        table = create_table(self._job, rows, used)
        partial = f"{self._root}/.{shard.name}.partial"
        pq.write_table(table, partial, filesystem=self._filesystem)
        self._filesystem.move(partial, f"{self._root}/{shard.name}.parquet")
        return len(rows) - int(table["error"].null_count)

    def check_digests(self) -> None:
        """Check that one version of the model made all results.

        Raises:
            SourceFormatError: it was changed between two runs.
        """
        digests = {
            (pq.read_schema(path, filesystem=self._filesystem).metadata or {})[b"model_digest"]
            for path in self._parts()
        }
        if len(digests) > 1:
            raise SourceFormatError(
                f"{self._job.output} has results of {len(digests)} versions of {self._job.model}"
            )

    def write_lance(self) -> None:
        """Write all results as the Lance table `results.lance` in the folder, in place of an
        earlier one. It appears whole or not at all. Embeddings are vectors there."""
        import lancedb  # takes a second, and most runs do without it

        schema = self._vector_schema()
        rows = (self._read(path).cast(schema) for path in self._parts())
        batches = (batch for table in rows for batch in table.to_batches())
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        database = lancedb.connect(self._job.output)
        # those of images that could not be read are null, which LanceDB would refuse
        database.create_table(LANCE, reader, mode="overwrite", on_bad_vectors="null")

    def _vector_schema(self) -> pa.Schema:
        """The schema of the results, with the length of embeddings in it."""
        schema = pq.read_schema(self._parts()[0], filesystem=self._filesystem)
        if schema.get_field_index(EMBEDDING) < 0:
            return schema
        for path in self._parts():
            lengths = pc.list_value_length(self._read(path)[EMBEDDING])
            if (length := pc.max(lengths).as_py()) is not None:
                vector = pa.field(EMBEDDING, pa.list_(pa.float32(), length))
                return schema.set(schema.get_field_index(EMBEDDING), vector)
        return schema  # no image could be read

    def _is_file(self, path: str) -> bool:
        return bool(self._filesystem.get_file_info(path).is_file)

    def _read(self, path: str) -> pa.Table:
        return pq.read_table(path, filesystem=self._filesystem)

    def _parts(self) -> list[str]:
        """The paths of the shards' files that are done."""
        files = self._filesystem.get_file_info(fs.FileSelector(self._root))
        return sorted(file.path for file in files if _is_part(file))


def create_table(job: Job, rows: Sequence[tuple[str, ImageResult]], used: ModelUsed) -> pa.Table:
    """The results as a table: `id`, `error`, and a column for each of the task's outputs."""
    outputs = output_columns(job)
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "error", *outputs)}
    for name, result in rows:
        error = result.error or next((o for o in result.outputs if isinstance(o, Exception)), None)
        columns["id"].append(name)
        columns["error"].append(None if error is None else str(error))
        arrays: Any = {} if error is not None else result.outputs[0]
        for output in outputs:
            columns[output].append(_value(arrays.get(output), outputs[output]))
    types = {"id": pa.string(), "error": pa.string()} | outputs
    metadata = {"model": used.name, "model_digest": used.model_digest,
                "preprocess_digest": used.preprocess_digest}  # fmt: skip
    schema = pa.schema(list(types.items()), metadata=metadata)
    return pa.table(columns, schema=schema)


def output_columns(job: Job) -> dict[str, pa.DataType]:
    """The types of a task's outputs by name: of several forms, the chosen one.

    Raises:
        InvalidInputError: its form has too many dimensions for a column.
    """
    task = tasks()[job.task]
    form = job.options.get("output") or next(iter(task.forms), None)
    outputs = [o for o in task.outputs if (o.name == form if o.form else not o.on_request)]
    for output in outputs:
        if output.datatype != "BYTES" and len(output.shape) > 2:
            raise InvalidInputError(f"output={output.name} does not fit into a column")
    return {output.name: _type(output) for output in outputs}


def _type(output: Output) -> pa.DataType:
    if output.datatype == "BYTES":
        return pa.binary() if len(output.shape) == 1 else pa.list_(pa.string())
    number = NUMBERS[output.datatype]
    return number if len(output.shape) == 1 else pa.list_(number)


def _value(array: np.ndarray | None, column: pa.DataType) -> Any:
    if array is None:
        return None
    if pa.types.is_binary(column):
        return array.tobytes()
    return array.ravel().tolist() if pa.types.is_list(column) else array.item()


def _is_part(file: fs.FileInfo) -> bool:
    return bool(file.is_file and file.extension == "parquet")
