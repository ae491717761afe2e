"""Tables: printed, and written as parquet files."""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

# Lines of a pipe are not wrapped, so that they can be searched.
PIPE_WIDTH = 200


def table_console() -> Console:
    """Where tables are printed: standard output, as wide as its terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """Write rows as parquet, with every column."""
    if output.suffix != ".parquet":
        raise typer.BadParameter(f"{output}: results are written to .parquet files")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), output)
