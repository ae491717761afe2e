"""The shape of the code itself: who may import whom, how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
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


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Modules that each module imports, also inside functions and under TYPE_CHECKING."""
    modules = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                edges |= {item.name for item in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{item.name}" for item in node.names}
                edges |= (inner & modules.keys()) or {node.module}
        graph[name] = edges & modules.keys()
    return graph


def find_cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The nodes of one cycle, or nothing."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for neighbour in sorted(graph[node]):
            if cycle := visit(neighbour, [*path, node]):
                return cycle
        finished.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    graph = import_graph()
    graph.pop("models")  # its public names are imported when they are used
    graph = {name: edges - {"models"} for name, edges in graph.items()}
    assert find_cycle(graph) == []


def test_nothing_outside_a_trunk_reads_its_network() -> None:
    """Except reference outputs: they are the authors' own, which no head returns."""
    allowed = {ROOT / "models/reference_outputs.py"}
    for path in SOURCES:
        if path.parent.name in ("trunks", "engines") or path in allowed:
            continue
        reads = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "network"
        ]
        assert [read for read in reads if "trunk" in read] == [], path


def test_the_sides_do_not_know_each_other() -> None:
    """Gateway, worker, and the two that carry requests between them, meet in `processes`."""
    sides = ("service.gateway", "service.worker", "service.remote", "service.processes")
    for folder, allowed in (
        ("gateway", ("service.gateway",)),
        ("worker", ("service.worker",)),
        ("rpc", ()),
        ("open_inference", ()),
        ("decoding", ()),
        ("remote", ("service.remote",)),
        ("ray", ("service.remote.merging", "service.remote.descriptions")),
    ):
        names = {name for name in imported(f"service/{folder}") if name.startswith(sides)}
        assert {name for name in names if not name.startswith(allowed or ("none",))} == set()


@pytest.mark.parametrize(
    "name", ["scheduler", "batch_queue", "batch_limit", "turns", "places", "costs"]
)
def test_the_policy_knows_no_threads_clocks_or_tensors(name: str) -> None:
    names = set(imports(ROOT / f"service/worker/{name}.py"))
    assert not names & {"threading", "asyncio", "time", "torch", "numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "service.processes.gateway",
        "service.processes.supervisor",
        "service.cli",
        "service.settings",
        "service.decoding.pool",
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
        "admin_keys", "admin_port", "api_keys", "body_timeout_s", "catalog", "catalog_poll_s",
        "collections",
        "decode_cpu_s",
        "decode_threads", "decoders", "default_timeout_ms", "device", "drain_delay_s",
        "drain_timeout_s", "engine",
        "grpc_port", "header_timeout_s", "heads_folder", "host", "image_folders", "keys_file",
        "label_cache_bytes",
        "log_level", "map_weights", "max_batch_size", "max_bytes_in_flight", "max_connections",
        "max_image_bytes", "max_image_pixels", "max_image_side", "max_images",
        "max_queue_delay_ms", "max_queue_size", "max_request_bytes", "max_requests_in_flight",
        "metrics_port", "model_memory_mb",
        "models", "port", "precision", "probe_interval_s", "shared_memory", "slow_request_s",
        "streams", "stuck_after_s", "tf32", "threads",
        "tls_cert", "tls_client_ca", "tls_key", "transform", "triton_metrics", "url_allow_private",
        "url_hosts", "url_timeout_s", "worker_ca", "worker_cert", "worker_key", "worker_token",
        "workers",
    ]  # fmt: skip
    assert all(field.description for field in Settings.model_fields.values())
