"""The page at `/`, in a real browser, against the real demo."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.service.test_heads import tinted

TIMEOUT_MS = 60_000


@pytest.fixture
def page(browser: Browser, own_demo: httpx.Client) -> Iterator[Page]:
    """The page, with the admin key; it fails on errors and on requests to other hosts."""
    opened = browser.new_page()
    opened.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    requested: list[str] = []
    problems: list[str] = []
    opened.on("request", lambda request: requested.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(f"{own_demo.base_url}/")
    opened.get_by_label("API key").fill("admin")
    yield opened
    opened.close()
    own = (str(own_demo.base_url), "data:", "blob:")
    assert [url for url in requested if not url.startswith(own)] == []
    assert problems == []


@pytest.fixture
def folder(tmp_path: Path, jpegs: dict[str, bytes]) -> Path:
    for name, content in jpegs.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    return tmp_path


@pytest.mark.weights
def test_a_photo_is_classified_and_the_request_shown(page: Page, folder: Path) -> None:
    model = page.get_by_label("Model", exact=True).first
    model.select_option("classify: efficientnet-lite0")
    page.get_by_label("Photo or clip").set_input_files(folder / "coffee.jpg")
    expect(page.locator("#answer .bar").first).to_contain_text("espresso")
    expect(page.locator("#timing")).to_contain_text("compute")
    code = page.locator("#snippets pre")
    expect(code).to_contain_text("image=@coffee.jpg")
    expect(code).to_contain_text("model=efficientnet-lite0")
    page.get_by_role("button", name="Python").click()
    expect(code).to_contain_text("httpx.post")
    model.select_option("segment: dinov2-focus")
    expect(page.get_by_role("img", name="mask")).to_be_visible()
    expect(page.get_by_label("Threshold")).to_be_visible()


@pytest.mark.weights
def test_labels_are_scored_while_they_are_typed(page: Page) -> None:
    page.get_by_label("Model", exact=True).first.select_option("zero-shot: lite0-minilm")
    page.get_by_role("button", name="Sample photo").click()
    page.get_by_label("Labels").fill("an astronaut, a cup of coffee")
    expect(page.locator("#answer .bar")).to_have_count(2)
    page.get_by_label("Labels").fill("an astronaut, a cup of coffee, <b>a cat</b>")
    expect(page.locator("#answer .bar")).to_have_count(3)
    expect(page.locator("#answer")).to_contain_text("<b>a cat</b>")  # as text


@pytest.mark.weights
def test_classes_of_ones_own_are_fitted_and_tried(page: Page, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Classes of your own").click()
    for number, label in enumerate(("red", "blue"), 1):
        files = [tmp_path / f"{label}-{seed}.png" for seed in range(6)]
        for seed, path in enumerate(files):
            path.write_bytes(tinted(label, seed))
        page.get_by_label(f"Name of class {number}").fill(label)
        page.get_by_label(f"Photos of class {number}").set_input_files(files)
    page.locator("#classes").get_by_label("On").select_option("efficientnet-lite0")
    page.get_by_role("button", name="Fit").click()
    expect(page.locator("#progress")).to_contain_text("is ready")
    expect(page.get_by_role("img", name="How accuracy grew")).to_be_visible()
    page.get_by_label("Photo to try").set_input_files(tmp_path / "blue-1.png")
    expect(page.locator("#fitted .bar").first).to_contain_text("blue")


@pytest.mark.weights
def test_photos_are_indexed_and_found_by_words_and_by_a_photo(page: Page, folder: Path) -> None:
    page.get_by_role("tab", name="Search").click()
    page.locator("#collection select").select_option("lite0-minilm")
    page.get_by_label("Photos to add").set_input_files(sorted(folder.glob("*.jpg")))
    expect(page.locator("#indexed")).to_contain_text("4 photos in photos")
    page.get_by_label("Words to search for").fill("a cup of coffee")
    page.locator("#query").get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#hits figcaption").first).to_contain_text("coffee.jpg")
    page.get_by_label("Photo to search by").set_input_files(folder / "rocket.jpg")
    expect(page.locator("#hits figcaption").first).to_contain_text("rocket.jpg 1.000")
    expect(page.locator("#hits img")).to_have_count(4)


@pytest.mark.weights
def test_models_are_unloaded_and_loaded_by_keyboard(page: Page) -> None:
    page.get_by_role("tab", name="Try").focus()
    page.keyboard.press("ArrowLeft")  # the last tab
    page.get_by_role("button", name="Unload stamps").click()
    page.get_by_role("button", name="Load stamps", exact=True).click()
    expect(page.get_by_role("button", name="Unload stamps")).to_be_visible()
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Unload stamps").click()
    expect(page.locator("#models-error")).to_contain_text("403")
