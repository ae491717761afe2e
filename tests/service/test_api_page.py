"""`/docs` in a real browser, and the example requests that it shows."""

from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from tests.conftest import wait_until


def example_request(path: str, method: str, operation: dict[str, Any]) -> httpx.Request:
    """The request of an operation's example."""
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            [value] = parameter["schema"].get("examples", ["1"])  # versions have none
            path = path.replace(f"{{{parameter['name']}}}", value)
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        return httpx.Request(method, path, json=content["application/json"]["example"])
    if content:  # a form
        fields = content["multipart/form-data"]["example"].items()
        return httpx.Request(method, path, files={name: (None, value) for name, value in fields})
    return httpx.Request(method, path)


@pytest.mark.weights
def test_the_examples_of_all_routes_are_answered(own_demo: httpx.Client) -> None:
    operations = [
        (path, method, operation)
        for path, methods in own_demo.get("/openapi.json").json()["paths"].items()
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
        answer = own_demo.request(
            method, example.url, content=example.read(), headers=example.headers
        )
        if f"no model for the task '{path.strip('/')}'" in answer.text:
            assert path in ("/depth", "/generate", "/reconstruct")
        else:
            assert answer.is_success, f"{method} {path}: {answer.text}"
        if path == "/heads" and method == "post":
            wait_until(
                lambda: own_demo.get("/heads/colours").json()["state"] in ("ready", "failed"), 120
            )
            assert own_demo.get("/heads/colours").json()["state"] == "ready", own_demo.get(
                "/heads/colours"
            ).text


@pytest.mark.weights
def test_the_page_shows_and_runs_the_api_without_the_internet(
    browser: Browser, own_demo: httpx.Client
) -> None:
    page = browser.new_page()
    requested: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(f"{own_demo.base_url}/docs")
    page.locator("#operations-tasks-classify_classify_post").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table").get_by_text("predictions").first.wait_for()
    assert problems == []
    own = (str(own_demo.base_url), "data:", "blob:")
    assert [url for url in requested if not url.startswith(own)] == []
    page.close()


@pytest.mark.weights
def test_errors_have_the_documented_statuses_and_form(own_demo: httpx.Client) -> None:
    """Each operation with what is wrong in several ways: every answer is one of its own."""
    document = own_demo.get("/openapi.json").json()
    bodies: list[dict[str, Any]] = [
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        {"content": b"x", "headers": {"Content-Type": "text/plain"}},
        {"json": {"unknown": 1}},
        {"content": b"no image"},
        {"headers": {"X-Timeout-Ms": "-1"}},
        {"headers": {"X-API-Key": "wrong"}},
    ]
    seen: set[int] = set()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert {"500"} < operation["responses"].keys(), path
            url = path.replace("{name}", "none-such").replace("{", "").replace("}", "")
            for body in bodies:
                answer = own_demo.request(method, url, **body)
                if answer.is_success:
                    continue
                described = operation["responses"].get(str(answer.status_code))
                assert described, f"{method} {path}: {answer.status_code} {answer.text}"
                if answer.content:
                    assert answer.headers["Content-Type"] in described["content"]
                    assert answer.json().keys() >= {"type", "title", "status", "detail"}
                seen.add(answer.status_code)
    assert {400, 403, 404, 415, 422} <= seen
