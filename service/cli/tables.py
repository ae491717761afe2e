"""Writes results as parquet files."""

from pathlib import Path
from typing import Any

import typer


def write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """Write rows as parquet, with every column."""
    if output.suffix != ".parquet":
        raise typer.BadParameter(f"{output}: results are written to .parquet files")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), output)
