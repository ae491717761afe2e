"""The page at `/`, in a real browser, against the real demo."""

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found


def test_the_page_lists_the_models_that_are_ready(
    chromium: str, demo_server: str, tmp_path: Path
) -> None:
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000",
        "--dump-dom", f"{demo_server}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for name in (
        "classify: efficientnet-lite0", "segment: dinov2-focus", "zero-shot: lite0-minilm",
        "attention: dinov2-focus",
    ):  # fmt: skip
        assert f">{name}</option>" in done.stdout


def test_the_page_needs_nothing_from_elsewhere(demo_server: str) -> None:
    page = httpx.get(f"{demo_server}/").text
    assert "http://" not in page
    assert "https://" not in page
