"""Vitrail, rival servers and bare loops side by side: `python -m benchmarks.comparison`.

    python -m benchmarks.comparison --models tf_efficientnet_lite0 --servers vitrail,litserve \\
        --connections 1,32 --rounds 3 --seconds 8 --output runs/lite0.json

All serve the same weights with the same transform. In every round each server gets a fresh process
for each model, in an order drawn anew, and so do the bare loops of each engine. All numbers go into
one JSON file; `python -m benchmarks.report` makes tables and plots of it. Rivals are installed by
`python -m benchmarks.rivals install`.
"""

import argparse
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.bundle import Bundle, Setting
from benchmarks.candidates import CANDIDATES, Launcher
from benchmarks.load_process import LoadProcess
from benchmarks.machine import describe_machine
from benchmarks.measuring import BARE, Case, Loads, Measuring
from benchmarks.photos import SIZES
from benchmarks.rivals.environments import FOLDER, packages
from benchmarks.servers import StartError
from benchmarks.workload import Workload

# Fewer answers agree where pixels or weights are rounded.
MIN_AGREEMENT = 0.98
MIN_AGREEMENT_ROUNDED = 0.8


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped, too
    arguments = _parser().parse_args()
    if unknown := set(arguments.servers) - set(CANDIDATES):
        raise SystemExit(f"unknown servers {', '.join(sorted(unknown))}")
    setting = Setting(
        transform=arguments.transform,
        precision=arguments.precision,
        photos=arguments.photos,
        images=arguments.images_per_request,
    )
    rounded = setting.transform != "exact" or setting.precision != "float32"
    bundle = Bundle(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        arguments=vars(arguments),
        machine=describe_machine(),
        rivals={name: pins for name, pins in packages().items() if name in arguments.servers},
        setting=setting,
        min_agreement=MIN_AGREEMENT_ROUNDED if rounded else MIN_AGREEMENT,
    )
    folder: Path = arguments.folder.absolute()
    launcher = Launcher(
        workload=Workload(folder / "workload", setting.photos),
        setting=setting,
        rivals=folder,
        logs=folder / "logs",
        rival_batch=arguments.rival_batch,
    )
    _prepare(launcher.workload, arguments)
    _run(bundle, launcher, arguments)
    bundle.save(arguments.output)
    print(f"{arguments.output}: {len(bundle.measurements)} measurements", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.comparison")
    add = parser.add_argument
    add("--models", type=_names, default=["tf_efficientnet_lite0"], help="by their names in timm")
    add("--servers", type=_names, default=list(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
    add("--engines", type=_names, default=["eager", "openvino"], help="of the bare loops")
    add("--connections", type=_numbers, default=[1, 8, 32], help="of closed loops")
    add("--open-loop", type=_percents, default=[], metavar="SHARES",
        help="rates of open loops, as shares of the fastest bare loop's")  # fmt: skip
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=8, help="of each load")
    add("--warm", type=float, default=4, help="seconds of load before the first one that counts")
    add("--transform", choices=("exact", "fast"), default="exact", help="Vitrail's")
    add("--precision", default="float32", help="Vitrail's")
    add("--photos", choices=SIZES, default="small")
    add("--images-per-request", type=int, default=1)
    add("--rival-batch", type=int, default=4, help="most images in a rival's batch")
    add("--seed", type=int, default=0, help="of the order")
    add("--folder", type=Path, default=FOLDER, help="environments, weights, photos and logs")
    add("--output", type=Path, required=True, help="the JSON file to write")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def _percents(text: str) -> list[int]:
    return [round(100 * float(share)) for share in _names(text)]


def _prepare(workload: Workload, arguments: argparse.Namespace) -> None:
    """Make photos, weights and expected answers, in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.prepare", "--folder", str(workload.folder),
        "--models", ",".join(arguments.models), "--photos", workload.kind,
        "--transform", arguments.transform,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def _run(bundle: Bundle, launcher: Launcher, arguments: argparse.Namespace) -> None:
    """All rounds. The first one begins with the bare loops, since the rates of open loops depend
    on theirs."""
    order = random.Random(arguments.seed)
    loads = Loads(arguments.connections, arguments.open_loop, arguments.seconds, arguments.warm)
    names = [*(BARE + engine for engine in arguments.engines), *arguments.servers]
    with LoadProcess() as generator:
        measuring = Measuring(launcher, generator, loads, order)
        for number in range(arguments.rounds):
            cases = [Case(model, name, number) for model in arguments.models for name in names]
            order.shuffle(cases)
            if number == 0:
                cases.sort(key=lambda case: case.engine is None)
            for case in cases:
                print(case, file=sys.stderr, flush=True)
                try:
                    bundle.measurements += measuring.measure(case)
                except StartError as error:
                    bundle.errors.append(f"{case}: {error}")
                    print(bundle.errors[-1], file=sys.stderr)


if __name__ == "__main__":
    main()
