"""The README and the documentation site: commands run, links resolve, reference pages are whole."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from models import Registry
from models.catalog import ModelEntry, TrunkEntry, load_catalog
from models.checkpoints.formats import checkpoint_formats
from models.tasks.table import tasks
from service.settings import Settings

from .conftest import Running

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CLIENTS = ROOT / "docs/guides/clients.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
DEMO_URL = "localhost:8000"

BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE_PATH = re.compile(r"`((?:models|service|tests|docs|deploy|proto)/[\w./-]+)`")
LOADED = re.compile(r'<(?:script|img|iframe)[^>]* src="(\w+:)?//|<link[^>]* href="https?://')


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The code blocks of a page that are in one of these languages."""
    for language, content in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield content


def commands(page: Path, program: str) -> Iterator[tuple[str, str]]:
    """Each command of a page that starts with `program`, and the answer shown below it, if any."""
    for content in blocks(page, "sh"):
        yield from ((line, "") for line in content.splitlines() if line.startswith(program))
    for content in blocks(page, "console"):
        for part in re.split(r"^\$ ", content, flags=re.MULTILINE):
            command, _, shown = part.partition("\n")
            if command.startswith(program):
                yield command, shown


def run(command: Sequence[str], folder: Path, **environment: str) -> str:
    """The output of a command that succeeds."""
    finished = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
    return finished.stdout


@pytest.fixture
def folder(tmp_path: Path, photos: dict[str, Image.Image]) -> Path:
    """A folder with the files that the README's commands name."""
    (tmp_path / "photos").mkdir()
    for name in ("cat.jpg", "photos/cat.jpg"):
        photos["chelsea"].save(tmp_path / name, quality=92)
    for name in ("coffee.jpg", "photos/coffee.jpg"):
        photos["coffee"].save(tmp_path / name, quality=92)
    return tmp_path


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built as `make docs` builds it."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (make docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run(command, ROOT, NO_MKDOCS_2_WARNING="1")
    return folder


def test_the_readme_has_fewer_than_200_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_folders_named_in_pages_exist(page: Path) -> None:
    paths = CODE_PATH.findall(page.read_text(encoding="utf-8"))
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.weights
def test_the_calls_for_those_who_come_from_elsewhere_are_answered(
    demo_server: str, folder: Path
) -> None:
    called = [command for command, _ in commands(ROOT / "docs/guides/coming-from.md", "curl")]
    assert len(called) == 10
    for command in called:
        line = command.replace(DEMO_URL, demo_server)
        run([*shlex.split(line), "--silent", "--fail-with-body"], folder)


@pytest.mark.weights
def test_the_readmes_calls_are_answered_as_it_shows(demo_server: str, folder: Path) -> None:
    ran = 0
    for command, shown in commands(README, "curl"):
        if "/heads" in command or "model=kinds" in command:  # need a fitted head
            continue
        called = command.replace(DEMO_URL, demo_server)
        answer = run([*shlex.split(called), "--silent", "--fail-with-body"], folder)
        for member in re.findall(r'"(?:model|label)":"[^"]+"', shown):
            assert member in answer, command
        ran += 1
    assert ran >= 9


@pytest.mark.weights
def test_the_readmes_commands_for_folders_work(demo_server: str, folder: Path) -> None:
    ran = []
    for command, _ in commands(README, ".venv/bin/vitrail"):
        name, *arguments = shlex.split(command)[1:]
        if name in ("classify", "segment", "embed", "search"):
            vitrail = [sys.executable, "-m", "service.cli"]
            run([*vitrail, name, *arguments], folder, VITRAIL_URL=demo_server)
            ran.append(name)
    assert ran == ["classify", "segment", "embed", "search"]
    assert len(list((folder / "masks").glob("*.png"))) == 4
    assert (folder / "vectors.parquet").stat().st_size > 0


@pytest.mark.weights
def test_the_example_with_qdrant_finds_the_photo(demo_server: str, folder: Path) -> None:
    pages = blocks(ROOT / "docs/guides/embeddings.md", "python")
    [example] = [content for content in pages if "qdrant" in content]
    found = run([sys.executable, "-c", example.replace(f"http://{DEMO_URL}", demo_server)], folder)
    assert [line.split()[1] for line in found.splitlines()] == [
        "photos/coffee.jpg",
        "photos/cat.jpg",
    ]


@pytest.fixture
def indexed(own_demo: httpx.Client, folder: Path) -> Iterator[str]:
    """The URL of a demo whose collection `photos` has the photos."""
    own_demo.delete("/collections/photos")  # tests of the page leave one
    own_demo.put("/collections/photos", json={"model": "lite0-minilm"}).raise_for_status()
    for name in ("cat.jpg", "coffee.jpg"):
        content, to = (folder / name).read_bytes(), f"/collections/photos/images?id={name}"
        own_demo.post(to, content=content).raise_for_status()
    yield str(own_demo.base_url)
    own_demo.delete("/collections/photos")


@pytest.mark.weights
def test_the_examples_of_the_python_clients_run(indexed: str, folder: Path) -> None:
    examples = "\n".join(blocks(CLIENTS, "python"))
    for given in ('Client("http://localhost:8000")', "Client()"):
        examples = examples.replace(given, f'Client("{indexed}", key="admin")')
    found = run([sys.executable, "-c", f"paths = ['cat.jpg', 'coffee.jpg']\n{examples}"], folder)
    lines = found.splitlines()
    assert lines[:3] == ["cat.jpg tiger cat", "coffee.jpg espresso", "cat.jpg coffee.jpg"]
    assert lines[3].startswith("404 no model 'none'")


@pytest.mark.weights
def test_the_example_of_the_javascript_client_runs(indexed: str, folder: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed (apt-get install nodejs)")
    (folder / "vitrail.mjs").write_bytes(httpx.get(f"{indexed}/assets/vitrail.js").content)
    [example] = blocks(CLIENTS, "js")
    given, own = '"http://localhost:8000", {', f'"{indexed}", {{ key: "admin",'
    (folder / "example.mjs").write_text(example.replace(given, own))
    assert "'coffee.jpg 0." in run([node, "example.mjs"], folder)


def test_the_readmes_catalog_serves_a_checkpoint(
    tmp_path: Path, photos: dict[str, Image.Image]
) -> None:
    (catalog,) = blocks(README, "toml")
    (tmp_path / "flowers.toml").write_text(catalog)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_file(network.state_dict(), tmp_path / "flowers.safetensors")
    registry = Registry.from_catalog(tmp_path / "flowers.toml", device="cpu")
    (entry,) = registry.get("flowers").predict([photos["coffee"]])
    assert {p["label"] for p in entry["predictions"]} == {"rose", "tulip", "daisy"}
    assert registry.get("flowers-embed").trunk is registry.get("flowers").trunk


@pytest.mark.parametrize("name", ["tutorial", "guides/own-checkpoint"])
def test_catalogs_in_guides_are_valid(name: str, tmp_path: Path) -> None:
    for content in blocks(ROOT / f"docs/{name}.md", "toml"):
        (tmp_path / "catalog.toml").write_text(content)
        load_catalog(tmp_path / "catalog.toml")


def test_every_catalog_key_is_explained() -> None:
    page = (ROOT / "docs/reference/catalog.md").read_text(encoding="utf-8")
    trunks, models = page.split("## `[models.NAME]`")
    for entry, section in ((TrunkEntry, trunks), (ModelEntry, models)):
        keys = {field.name for field in fields(entry)} - {"name"}
        assert not [key for key in keys if f"`{key}`" not in section]


def test_every_setting_is_in_the_reference(site: Path) -> None:
    page = (site / "reference/settings.html").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        assert f"VITRAIL_{name.upper()}<" in page
        assert field.description, name


def test_every_metric_that_servers_export_is_in_the_reference(site: Path, tiny: Running) -> None:
    page = (site / "reference/metrics.html").read_text(encoding="utf-8")
    exported = set(re.findall(r"^# TYPE (vitrail_\w+)", tiny.metrics(), re.MULTILINE))
    exported = {name for name in exported if not name.endswith("_created")}
    assert len(exported) > 10
    assert not [name for name in exported if f">{name}<" not in page]


def test_every_task_option_output_and_format_is_in_the_reference(site: Path) -> None:
    page = (site / "reference/tasks.html").read_text(encoding="utf-8")
    for task in tasks().values():
        names = [*task.options.model_fields, *(output.name for output in task.outputs)]
        assert not [name for name in names if f">{name}<" not in page]
    page = (site / "reference/formats.html").read_text(encoding="utf-8")
    assert not [item.NAME for item in checkpoint_formats() if f">{item.NAME}<" not in page]


def test_every_route_is_in_the_reference(site: Path, tiny: Running) -> None:
    page = (site / "reference/routes.html").read_text(encoding="utf-8")
    for path, methods in tiny.client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f">{method.upper()} {path}<" in page


def test_every_grpc_method_and_command_is_in_the_reference(site: Path) -> None:
    page = (site / "reference/grpc.html").read_text(encoding="utf-8")
    for proto in ROOT.glob("proto/**/*.proto"):
        for method in re.findall(r"^  rpc (\w+)", proto.read_text(), re.MULTILINE):
            assert f">{method}<" in page
    page = (site / "reference/command-line.html").read_text(encoding="utf-8")
    for command in ("serve", "gateway", "worker", "health", "fit", "models convert", "search"):
        assert f">vitrail {command}<" in page


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not LOADED.search(page.read_text(encoding="utf-8")), page
