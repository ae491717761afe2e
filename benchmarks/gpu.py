"""Everything that is to be measured on a GPU, in one command: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu                              # all parts that are not in the bundle yet
    python -m benchmarks.gpu --part ceiling:vit-b16       # one part, again
    python -m benchmarks.gpu --device cpu --quick         # tries the benchmark itself

Needs no download: networks have random weights, and the fixtures are read from `--shared`. Each
part runs in a process of its own and is ended after eight minutes. Results are added to
`bundle.json` in the folder, with a table (`table.md`) and a plot for each part. An interrupted run
goes on where it was.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.gpu_models import NETWORKS, Options
from benchmarks.gpu_parts import BY_NETWORK, PARTS
from benchmarks.machine import describe_machine
from models.trunks.devices import resolve_device

PART_S = 480
Bundle = dict[str, Any]


def main() -> None:
    arguments = parse()
    options = options_of(arguments)
    path = options.folder / "bundle.json"
    if arguments.part:
        for name in arguments.part.split(","):
            run_part(name, options, path)
        if arguments.is_child:
            return
    else:
        for name in names(options):
            if name not in load(path)["parts"]:
                run_apart(name, path)
    report(load(path), options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", help="one or more of " + ", ".join(PARTS) + "; PART:NETWORK")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds")
    parser.add_argument("--networks", help="of " + ", ".join(NETWORKS))
    parser.add_argument("--engines", help="such as eager,cuda-graph,compile")
    parser.add_argument("--precisions", help="the first one is served; bfloat16,float16,float32")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    parser.add_argument("--clients", type=int, help="requests in flight")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--is-child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def options_of(arguments: argparse.Namespace) -> Options:
    """The defaults suit a large GPU; `--quick` suits anything."""
    quick = arguments.quick
    device = resolve_device(arguments.device)
    networks = "tiny" if quick else ",".join(name for name in NETWORKS if name != "tiny")
    engines = "eager,cuda-graph,compile" if device.type == "cuda" else "eager"
    precisions = "bfloat16,float16,float32" if device.type == "cuda" else "float32"
    return Options(
        folder=arguments.folder,
        device=device,
        networks=tuple((arguments.networks or networks).split(",")),
        engines=tuple((arguments.engines or engines).split(",")),
        precisions=tuple((arguments.precisions or precisions).split(",")),
        batches=(1, 4) if quick else (1, 8, 32, 64, 128, 256),
        clients=arguments.clients or (8 if quick else 1024),
        seconds=arguments.seconds or (0.2 if quick else 3.0),
        quick=quick,
        shared=arguments.shared,
    )


def names(options: Options) -> list[str]:
    """The parts to run: one for each network where that is slow."""
    return [
        f"{part}:{network}" if network else part
        for part in PARTS
        for network in (options.networks if part in BY_NETWORK else ("",))
    ]


def run_apart(name: str, path: Path) -> None:
    """Run a part in a process of its own: a GPU's error ends that process alone."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--part", name, "--is-child"]
    try:
        status = subprocess.run(command, timeout=PART_S, check=False).returncode
        failure = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        failure = f"took more than {PART_S} s"
    if failure:
        print(f"{name}: {failure}", flush=True)
        bundle = load(path)
        rows = bundle["parts"].get(name, {}).get("rows", [])
        bundle["parts"][name] = {"failed": failure, "rows": rows}
        save(bundle, path)


def run_part(name: str, options: Options, path: Path) -> None:
    """Run a part in this process, and save its rows as they come."""
    part, _, network = name.partition(":")
    if part not in PARTS:
        raise SystemExit(f"no part {part!r}; there are {', '.join(PARTS)}")
    bundle = load(path)
    done = {key: value["rows"] for key, value in bundle["parts"].items()}
    options = replace(options, done=done, networks=(network,) if network else options.networks)
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    print(f"== {name}", flush=True)
    for row in PARTS[part](options):
        print("  " + line(row), flush=True)
        rows.append(row)
        entry = {"rows": rows, "seconds": time.monotonic() - started, "arguments": sys.argv[1:]}
        bundle["parts"][name] = entry
        save(bundle, path)


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
    broken = [f"{name}: {line(row)}" for name, part in bundle["parts"].items()
              for row in part["rows"] if row.get("holds") is False or "failed" in row]  # fmt: skip
    print(f"{folder / 'table.md'}: {len(broken)} rows do not hold")
    for row in broken:
        print(f"  {row}")


def plot(name: str, rows: list[dict[str, Any]]) -> Figure:
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


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    return ", ".join(
        f"{key} {_number(value)}" for key, value in row.items() if value not in ("", None)
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
