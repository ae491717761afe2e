"""`vitrail doctor`: what is wrong with this machine, and what to do about it."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from service.cli.starting import check_port, setting_problems
from service.cli.tables import table_console

GIB = 2**30
# The demo takes about 1 GiB in memory and half on disk.
LOW_MEMORY, NO_MEMORY = 4 * GIB, GIB
LOW_DISK, NO_DISK = 5 * GIB, GIB // 2
LOW_FILES = 4096
PACKAGES = ("torch", "timm", "open_clip_torch", "openvino", "fastapi", "grpcio", "lancedb")
STYLES = {"ok": "green", "warning": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: its state, what it is, and what to do if it is not ok."""

    subject: str
    state: Literal["ok", "warning", "bad"]
    found: str
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for what keeps Vitrail from running well here, and say what to do.

    Exits with 1 if something keeps it from running at all.
    """
    findings = [finding for check in CHECKS for finding in check()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = f"[{STYLES[finding.state]}]{finding.state}[/]"
            advice = f"\n{finding.advice}" if finding.advice else ""
            table.add_row(mark, finding.subject, finding.found + advice)
        table_console().print(table)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def check_versions() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    yield Finding("packages", "ok", ", ".join(found))
    if "torch" in missing:
        advice = "`vitrail gateway` runs without; for models, pip install vitrail"
        yield Finding("packages", "warning", f"without {', '.join(missing)}", advice)


def check_settings() -> Iterator[Finding]:
    from pydantic import ValidationError

    from models.catalog import load_catalog
    from models.catalog_content import without_secrets
    from models.errors import ModelsError
    from service.settings import Settings
    from service.unknown_variables import unknown_variables

    try:
        settings = Settings()
    except ValidationError as error:
        for variable, problem in setting_problems(error):
            found = f"{variable}: {problem}" if variable else problem
            yield Finding(
                "settings", "bad", found, f"unset or correct {variable}" if variable else ""
            )
        return
    set_here = sorted(f"VITRAIL_{name.upper()}" for name in settings.model_fields_set)
    yield Finding("settings", "ok", ", ".join(set_here) or "all at their defaults")
    for problem in unknown_variables(settings, os.environ):
        yield Finding("settings", "warning", problem, "correct or unset it")
    try:
        catalog = load_catalog(settings.catalog)
        found = f"{without_secrets(settings.catalog)}: {len(catalog.models)} models"
        yield Finding("catalog", "ok", found)
    except ModelsError as error:
        yield Finding("catalog", "bad", str(error), "see VITRAIL_CATALOG")
    for name, port in (("REST port", settings.port), ("gRPC port", settings.grpc_port)):
        yield _check_port(name, settings.host, port)


def _check_port(name: str, host: str, port: int) -> Finding:
    try:
        check_port(host, port, "--port" if name.startswith("REST") else "--grpc-port")
    except OSError as error:
        found, _, advice = str(error).partition("; ")
        return Finding(name, "bad", found, advice)
    return Finding(name, "ok", f"{host}:{port} is free")


def check_device() -> Iterator[Finding]:
    from service.worker_options import usable_cores

    yield Finding("CPU", "ok", f"{usable_cores()} cores")
    driver = _nvidia_driver()
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {driver}"
            low = free < LOW_MEMORY
            advice = "another process holds its memory; `nvidia-smi` shows which" if low else ""
            yield Finding("GPU", "warning" if low else "ok", found, advice)
    elif not driver:
        yield Finding("GPU", "ok", "none; models run on the CPU")
    elif torch.version.cuda is None:
        advice = "install torch's default build: pip install --force-reinstall torch"
        yield Finding("GPU", "warning", f"{driver}, but torch is a build for CPUs", advice)
    else:
        advice = f"torch needs a driver for CUDA {torch.version.cuda}; update it, or look for "
        advice += "CUDA_VISIBLE_DEVICES in the environment"
        yield Finding("GPU", "bad", f"{driver}, but torch cannot use it", advice)


def _nvidia_driver() -> str:
    """The driver's version, if an NVIDIA GPU is there."""
    if shutil.which("nvidia-smi") is None:
        return "an NVIDIA GPU without nvidia-smi" if Path("/dev/nvidia0").exists() else ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"a driver that fails ({(done.stdout + done.stderr).strip().splitlines()[:1]})"
    return f"driver {done.stdout.split()[0]}" if done.stdout.strip() else ""


def check_memory() -> Iterator[Finding]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return
    lines = dict(line.split(":") for line in path.read_text(encoding="utf-8").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    total = int(lines["MemTotal"].split()[0]) * 1024
    state, advice = _grade(free, LOW_MEMORY, NO_MEMORY)
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB available"
    yield Finding("memory", state, found, advice and "load fewer models: --models NAME")


def check_disk() -> Iterator[Finding]:
    from models.checkpoints.store import default_store_path

    store = default_store_path()
    existing = next(path for path in (store, *store.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        advice = "make it writable, or set VITRAIL_STORE to a folder that is"
        yield Finding("store", "bad", f"{store} cannot be written", advice)
        return
    free = shutil.disk_usage(existing).free
    state, advice = _grade(free, LOW_DISK, NO_DISK)
    advice = advice and "free some space, or set VITRAIL_STORE to a folder on another disk"
    yield Finding("store", state, f"{store}, {free / GIB:.1f} GiB free", advice)


def check_files() -> Iterator[Finding]:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = 0 <= limit < LOW_FILES
    advice = f"each connection is one; raise it with `ulimit -n {LOW_FILES}`" if low else ""
    found = f"{limit} at a time" if limit >= 0 else "unlimited"
    yield Finding("open files", "warning" if low else "ok", found, advice)


def _grade(value: float, low: float, none: float) -> tuple[Literal["ok", "warning", "bad"], str]:
    """The state of an amount, and whether it needs advice."""
    if value < none:
        return "bad", "too little"
    return ("warning", "little") if value < low else ("ok", "")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_versions,
    check_settings,
    check_device,
    check_memory,
    check_disk,
    check_files,
)
