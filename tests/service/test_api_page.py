"""`/docs` in a real browser, and the example requests that it shows."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright
from prometheus_client import CollectorRegistry

from models import Registry
from service.gateway.app import create_app
from service.metrics import Metrics
from service.settings import Settings
from service.worker.backend import LocalBackend
from tests.conftest import serving, wait_until


@pytest.fixture(scope="module")
def client(demo: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The demo, with an admin key."""
    folder = tmp_path_factory.mktemp("state")
    stores: dict[str, Any] = {
        "heads_folder": str(folder / "heads"),
        "collections": str(folder / "collections"),
    }
    settings = Settings(device="cpu", admin_keys=("admin",), **stores)
    metrics = Metrics(CollectorRegistry())
    backend = LocalBackend(
        Registry.from_catalog("demo", device="cpu"), settings.worker_options, metrics
    )
    with serving(create_app(settings, backend, metrics), settings) as (_, opened):
        opened.headers["X-API-Key"] = "admin"
        wait_until(lambda: opened.get("/readyz").status_code == 200)
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def example_request(path: str, method: str, operation: dict[str, Any]) -> httpx.Request:
    """The request of an operation's example."""
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            [value] = parameter["schema"].get("examples", ["1"])  # versions have none
            path = path.replace(f"{{{parameter['name']}}}", value)
    content = operation.get("requestBody", {}).get("content", {})
    body = content["application/json"]["example"] if content else None
    return httpx.Request(method, path, json=body)


@pytest.mark.weights
def test_the_examples_of_all_routes_are_answered(client: httpx.Client) -> None:
    operations = [
        (path, method, operation)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method, operation in methods.items()
    ]
    # What is made is read, then deleted, parts first; a model is unloaded last, then loaded again.
    order = ["put", "post", "get", "delete"]

    def rank(item: tuple[str, str, Any]) -> tuple[bool, bool, int, bool, int]:
        path, method, _ = item
        end = path.rpartition("/")[2]
        depth = path.count("/") if method == "delete" else 0
        return end == "load", end == "unload", order.index(method), "{name}" in path, -depth

    operations.sort(key=rank)
    for path, method, operation in operations:
        example = example_request(path, method, operation)
        answer = client.request(
            method, example.url, content=example.read(), headers=example.headers
        )
        if f"no model for the task '{path.strip('/')}'" in answer.text:
            assert path in ("/depth", "/generate", "/reconstruct")
        else:
            assert answer.is_success, f"{method} {path}: {answer.text}"
        if path == "/heads" and method == "post":
            wait_until(lambda: client.get("/heads/colours").json()["state"] == "ready")


@pytest.mark.weights
def test_the_page_shows_and_runs_the_api_without_the_internet(
    browser: Browser, client: httpx.Client, tmp_path: Path
) -> None:
    page = browser.new_page()
    requested: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(f"{client.base_url}/docs")
    page.locator("#operations-tasks-classify_classify_post").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table").get_by_text("predictions").first.wait_for()
    assert problems == []
    own = (str(client.base_url), "data:", "blob:")
    assert [url for url in requested if not url.startswith(own)] == []
    page.close()
