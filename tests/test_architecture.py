"""The shape of the code itself: who may import whom, how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (*ROOT.glob("models/**/*.py"), *ROOT.glob("service/**/*.py"))
SOURCES = sorted(path for path in FILES if path.parent.name != "stubs")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imported(folder: str) -> set[str]:
    return {name for path in ROOT.glob(f"{folder}/**/*.py") for name in imports(path)}


def test_the_library_knows_nothing_of_the_service_or_the_web() -> None:
    roots = {name.partition(".")[0] for name in imported("models")}
    assert not roots & {"service", "fastapi", "starlette", "uvicorn", "grpc"}


def test_the_sides_do_not_know_each_other() -> None:
    """Gateway, worker, and the two that carry requests between them, meet in `processes`."""
    sides = ("service.gateway", "service.worker", "service.remote", "service.processes")
    for folder, allowed in (
        ("gateway", ("service.gateway",)),
        ("worker", ("service.worker",)),
        ("rpc", ()),
        ("open_inference", ()),
        ("remote", ("service.remote",)),
    ):
        names = {name for name in imported(f"service/{folder}") if name.startswith(sides)}
        assert {name for name in names if not name.startswith(allowed or ("none",))} == set()


def test_the_policy_knows_no_threads_clocks_or_tensors() -> None:
    names = set(imports(ROOT / "service/worker/scheduler.py"))
    assert not names & {"threading", "asyncio", "time", "torch", "numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "service.processes.gateway",
        "service.processes.supervisor",
        "service.cli",
        "service.settings",
    ],
)
def test_the_gateway_and_the_command_line_start_without_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_noun(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert path.name not in ("utils.py", "helpers.py", "common.py")


def test_the_settings_are_these() -> None:
    """A new knob is a visible decision."""
    from service.settings import Settings

    assert sorted(Settings.model_fields) == [
        "admin_keys", "api_keys", "body_timeout_s", "catalog", "decode_threads",
        "default_timeout_ms", "device", "drain_timeout_s", "dtype", "grpc_port", "header_timeout_s",
        "heads_folder", "host", "label_cache_bytes",
        "log_level", "max_batch_size", "max_image_bytes", "max_image_pixels", "max_image_side",
        "max_images", "max_queue_delay_ms", "max_queue_size", "max_request_bytes",
        "metrics_port", "models", "port", "probe_interval_s", "streams", "stuck_after_s", "threads",
        "url_allow_private", "url_hosts", "url_timeout_s", "workers",
    ]  # fmt: skip
    assert all(field.description for field in Settings.model_fields.values())
