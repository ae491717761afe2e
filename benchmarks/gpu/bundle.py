"""The results of all parts: one JSON file, a table, and plots."""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.gpu.options import Row
from benchmarks.machine import describe_machine

Bundle = dict[str, Any]


def load(path: Path) -> Bundle:
    """The bundle so far."""
    if path.is_file():
        bundle: Bundle = json.loads(path.read_text())
        return bundle
    return {"machine": describe_machine() | describe_gpu(), "parts": {}}


def save(bundle: Bundle, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(bundle, indent=1) + "\n")
    temporary.replace(path)


def describe_gpu() -> dict[str, object]:
    """The GPU and its driver's CUDA."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def report(bundle: Bundle, folder: Path) -> None:
    """Write `table.md`, and a plot for each part with rates."""
    lines = [f"# {bundle['machine']['gpu'] or bundle['machine']['processor']}"]
    for name, part in bundle["parts"].items():
        lines += ["", f"## {name}", "", f"{part.get('failed', '')}".strip()]
        lines += [f"- {line(row)}" for row in part["rows"]]
        if rates := [row for row in part["rows"] if "images_per_s" in row]:
            plot(name, rates).savefig(folder / f"{name.replace(':', '-')}.png")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    broken = [f"{name}: {part['failed']}" for name, part in bundle["parts"].items()
              if "failed" in part]  # fmt: skip
    broken += [f"{name}: {line(row)}" for name, part in bundle["parts"].items()
              for row in part["rows"] if row.get("holds") is False or "failed" in row]  # fmt: skip
    print(f"{folder / 'table.md'}: {len(broken)} rows do not hold")
    for row in broken:
        print(f"  {row}")


def plot(name: str, rows: list[Row]) -> Figure:
    """Images per second as bars."""
    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    kept = ("network", "engine", "precision", "batch", "heads", "decoders", "decoding")
    labels = [" ".join(str(row[key]) for key in kept if key in row) for row in rows]
    axes.barh(range(len(rows)), [row["images_per_s"] for row in rows])
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("images/s")
    axes.set_title(name)
    return figure


def line(row: Row) -> str:
    """A row in words."""
    return ", ".join(
        f"{key} {_number(value)}" for key, value in row.items() if value not in ("", None)
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
