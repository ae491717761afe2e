"""Other servers, over HTTP, with the same weights, photos and load."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bundle import Setting
from benchmarks.candidates import VITRAIL, Launcher
from benchmarks.gpu.networks import NETWORKS
from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.load import percentile
from benchmarks.load_process import LoadProcess
from benchmarks.measuring import Case, Loads, Measuring
from benchmarks.rivals.environments import FOLDER, install
from benchmarks.servers import StartError
from benchmarks.workload import Workload

RIVAL = "litserve"
# Those that cannot be installed beside the torch that is measured, and why.
REFUSED = {
    "infinity": "infinity-emb 0.0.78 needs colpali-engine for images, which needs torch < 2.14",
    "vllm": "vllm 0.33.0 needs torch 2.14.0",
}
# Images in a batch of the rival's. Its processes decode the images of a batch one by one.
RIVAL_BATCHES = (8, 32)

# A server that has just started may answer nothing in less.
LEAST_S = 2.0


def rivals(options: Options) -> Rows:
    """Vitrail by each engine, and LitServe with a process for each core; why others are missing."""
    model, _ = NETWORKS[options.networks[0]]
    folder = options.folder.absolute()
    workload = Workload(folder / "workload", "small")
    command = [sys.executable, "-m", "benchmarks.prepare", "--folder", str(workload.folder),
               "--models", model, "--no-convert"]  # fmt: skip
    subprocess.run(command, check=True)
    for name, reason in REFUSED.items():
        yield {"server": name, "refused": reason}
    if problem := _install(options):
        yield {"server": RIVAL, "refused": problem}
    seconds = max(options.seconds, LEAST_S)
    loads = Loads([options.clients], [], seconds, seconds / 2)
    with LoadProcess() as generator:
        for server, engine, batch in _variants(options, is_installed=not problem):
            launcher = Launcher(
                workload=workload,
                setting=Setting(transform="exact", precision=options.precision, photos="small",
                                images=1),
                rivals=FOLDER.absolute(),
                logs=folder / "logs",
                rival_batch=batch,
                device=options.device.type,
                engine=engine,
                environment={"VITRAIL_MAX_BATCH_SIZE": str(batch),
                             "VITRAIL_MAX_QUEUE_SIZE": str(2 * options.clients)},
            )  # fmt: skip
            row: Row = {"network": model, "server": server, "engine": engine, "batch": batch}
            try:
                measuring = Measuring(launcher, generator, loads, random.Random(0))
                [measured] = measuring.measure(Case(model, server, 0))
            except StartError as error:
                yield {**row, "failed": str(error)}
                continue
            latencies = measured.latencies_ms
            yield {**row, "images_per_s": measured.images_per_s, "failures": measured.failures,
                   "p50_ms": percentile(latencies, 0.5), "p99_ms": percentile(latencies, 0.99),
                   "agreement": measured.agreement,
                   "cpu_ms_per_image": 1e3 * measured.server_cpu_s / max(1, measured.answered),
                   }  # fmt: skip


def _variants(options: Options, *, is_installed: bool) -> Iterator[tuple[str, str, int]]:
    """Servers with their engines and batches."""
    for engine in options.engines:
        yield VITRAIL, engine, max(options.batches)
    if is_installed:
        for batch in RIVAL_BATCHES[: 1 if options.quick else None]:
            yield RIVAL, "", batch


def _install(options: Options) -> str:
    """Install the rival, or why it is not there. `--quick` takes what there is."""
    if options.quick:
        return "" if (FOLDER / RIVAL).is_dir() else "not installed; --quick installs nothing"
    Path(FOLDER).mkdir(exist_ok=True)
    try:
        install(RIVAL, FOLDER.absolute())
    except subprocess.CalledProcessError as error:
        return f"pip: status {error.returncode}"
    return ""
