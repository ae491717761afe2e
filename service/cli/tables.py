"""Client results as files."""

import base64
from pathlib import Path
from typing import Any

import typer


def write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """Write rows as parquet (every column) or, for masks, one PNG an image in a folder."""
    match output.suffix:
        case ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), output)
        case "":
            _write_masks(rows, output)
        case suffix:
            raise typer.BadParameter(f"cannot write {suffix} files; .parquet is known")


def _write_masks(rows: list[dict[str, Any]], folder: Path) -> None:
    if not rows or not isinstance(rows[0].get("mask"), str):
        raise typer.BadParameter("only masks go into a folder; name a .parquet file")
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        # the whole path in the name, so that equal names in two folders do not meet
        name = Path(row["path"]).with_suffix("").as_posix().strip("/").replace("/", "_")
        (folder / f"{name}.png").write_bytes(base64.b64decode(row["mask"]))
