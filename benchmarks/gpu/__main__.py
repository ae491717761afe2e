"""Everything that is to be measured on a GPU, in one command: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu                              # all parts that are not in the bundle yet
    python -m benchmarks.gpu --part lone:vit-b16,soak      # some parts, again
    python -m benchmarks.gpu --device cpu --quick         # tries the benchmark itself

Needs no download: networks have random weights, and the fixtures are read from `--shared`. Each
part runs in a process of its own and is ended after eight minutes, with all processes that it has
started; one that has many checks goes on in a new process before that. Results are added to
`bundle.json` in the folder, with a table (`table.md`) and a plot for each part. An interrupted run
goes on where it was.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.bundle import line, load, report, save
from benchmarks.gpu.networks import NETWORKS
from benchmarks.gpu.options import Options, Row, UnfinishedError
from benchmarks.gpu.parts import BY_NETWORK, BY_PRECISION, PARTS, RESUMABLE
from models.trunks.devices import PRECISIONS, resolve_device

PART_S = 480
GO_ON_S = 360  # after so long, a part that can go on leaves the rest to another process
FORMS = "; PART:NETWORK, PART:PRECISION and PART:NETWORK:PRECISION for less of one"


def main() -> None:
    arguments = parse()
    options = options_of(arguments)
    path = options.folder / "bundle.json"
    if arguments.part:
        for name in arguments.part.split(","):
            if not arguments.is_child:
                drop_failures(name, path)
            run_part(name, options, path)
        if arguments.is_child:
            return
    else:
        for name in names(options):
            part = load(path)["parts"].get(name, {})
            if "complete" in part or "failed" in part:
                continue
            if options.quick:  # starting a process takes longer than a part does
                run_here(name, options, path)
            else:
                run_apart(name, path)
    report(load(path), options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", help="one or more of " + ", ".join(PARTS) + FORMS)
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
    """The defaults suit a large GPU; `--quick` suits anything. It compiles nothing, which takes
    longer than all else, unless `--engines` says so."""
    quick = arguments.quick
    device = resolve_device(arguments.device)
    networks = "tiny" if quick else ",".join(name for name in NETWORKS if name != "tiny")
    engines, precisions = "eager", "float32"
    if device.type == "cuda":
        engines = "eager,cuda-graph" if quick else "eager,cuda-graph,compile"
        precisions = "bfloat16,float32" if quick else "bfloat16,float16,float32"
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
    """The parts to run: one for each network and precision where that is slow."""
    return [
        ":".join(filter(None, (part, network, precision)))
        for part in PARTS
        for network in (options.networks if part in BY_NETWORK else ("",))
        for precision in (options.precisions if part in BY_PRECISION else ("",))
    ]


def run_apart(name: str, path: Path) -> None:
    """Run a part in a process of its own: a GPU's error ends that process alone. Another one
    follows while a part goes on."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--part", name, "--is-child"]
    while "complete" not in (part := load(path)["parts"].get(name, {})):
        before = len(part.get("rows", ()))
        status = run_limited(command, PART_S)
        part = load(path)["parts"].get(name, {})
        if status is None:
            return note_failure(name, f"took more than {PART_S} s", path)
        if status or ("complete" not in part and len(part.get("rows", ())) == before):
            return note_failure(name, f"ended with status {status}", path)
    return None


def run_limited(command: Sequence[str], seconds: float) -> int | None:
    """The exit status of a command; None if it took longer, and was killed with its children."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def run_here(name: str, options: Options, path: Path) -> None:
    """Run a part in this process; if it fails, the others run all the same."""
    try:
        run_part(name, options, path)
    except Exception as error:
        note_failure(name, f"{type(error).__name__}: {error}"[:500], path)


def note_failure(name: str, failure: str, path: Path) -> None:
    print(f"{name}: {failure}", flush=True)
    bundle = load(path)
    rows = bundle["parts"].get(name, {}).get("rows", [])
    bundle["parts"][name] = {"failed": failure, "rows": rows}
    save(bundle, path)


def drop_failures(name: str, path: Path) -> None:
    """Have a part that goes on try again what has failed in it."""
    bundle = load(path)
    if (part := bundle["parts"].get(name)) is not None and "complete" not in part:
        part["rows"] = [row for row in part["rows"] if "failed" not in row]
        save(bundle, path)


def run_part(name: str, options: Options, path: Path) -> None:
    """Run a part in this process, and save its rows as they come."""
    part, *only = name.split(":")
    if part not in PARTS:
        raise SystemExit(f"no part {part!r}; there are {', '.join(PARTS)}")
    if wrong := set(only) - NETWORKS.keys() - set(PRECISIONS):
        raise SystemExit(f"{name}: no network or precision {', '.join(wrong)}")
    bundle = load(path)
    done = {key: value["rows"] for key, value in bundle["parts"].items()}
    earlier = bundle["parts"].get(name, {})
    goes_on = part in RESUMABLE and "complete" not in earlier
    started = time.monotonic()
    rows: list[Row] = list(earlier.get("rows", ())) if goes_on else []
    options = replace(
        options,
        done=done,
        own=tuple(rows),
        end=started + GO_ON_S,
        networks=tuple(each for each in only if each in NETWORKS) or options.networks,
        precisions=tuple(each for each in only if each in PRECISIONS) or options.precisions,
    )
    print(f"== {name}", flush=True)
    try:
        for row in PARTS[part](options):
            print("  " + line(row), flush=True)
            rows.append(row)
            entry = {"rows": rows, "seconds": time.monotonic() - started, "arguments": sys.argv[1:]}
            bundle["parts"][name] = entry
            save(bundle, path)
    except UnfinishedError:
        print(f"  {name} goes on when it is called again", flush=True)
        return
    bundle["parts"].setdefault(name, {"rows": []})["complete"] = True
    save(bundle, path)


if __name__ == "__main__":
    main()
