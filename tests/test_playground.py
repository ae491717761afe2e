"""The page at `/`, in a real browser, against the real demo."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.service.test_heads import tinted

TIMEOUT_MS = 20_000


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


def choose(page: Page, task: str, model: str, file: Path | None = None) -> Locator:
    """Ask a model about a file, or about the one before; the answer of the model."""
    page.get_by_role("tab", name=task, exact=True).click()
    page.get_by_label("Model", exact=True).first.select_option(model)
    if file is not None:
        page.get_by_label("Photo or clip").set_input_files(file)
    answer = page.get_by_role("article").filter(has=page.get_by_role("heading", name=model))
    expect(answer).to_have_count(1)
    return answer


def drop(page: Page, target: Locator, path: Path) -> None:
    """Drop a file or a folder from the desktop on an element."""
    box = target.bounding_box()
    assert box is not None
    place = {"x": box["x"] + 5, "y": box["y"] + 5}
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


def name_collection(page: Page, name: str) -> None:
    """Choose a new collection and its model, once the page knows that there is none."""
    page.get_by_label("Collection", exact=True).fill(name)
    page.get_by_label("Collection", exact=True).press("Tab")
    expect(page.locator("#indexed")).to_contain_text(f"There is no collection {name} yet")
    page.locator("#collection select").select_option("lite0-minilm")


# Copies a sample as a PNG, as a program for pictures does.
COPY = """async () => {
  const photo = await createImageBitmap(await (await fetch("assets/samples/cat.jpg")).blob());
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [photo.width, photo.height];
  canvas.getContext("2d").drawImage(photo, 0, 0);
  const png = await new Promise((resolve) => canvas.toBlob(resolve));
  await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
}"""


def shoot(page: Page, name: str) -> None:
    """Save what the page shows for the docs, if `make screenshots` asks for it."""
    if folder := os.environ.get("VITRAIL_SCREENSHOTS"):
        with Image.open(io.BytesIO(page.screenshot(full_page=True))) as shown:
            shown.convert("RGB").save(Path(folder) / f"page-{name}.webp", quality=80)


def pixels(canvas: Locator) -> str:
    """What a canvas shows."""
    content: str = canvas.evaluate("canvas => canvas.toDataURL()")
    return content


@pytest.mark.weights
def test_a_photo_is_classified_and_the_request_shown(page: Page, folder: Path) -> None:
    answer = choose(page, "Classify", "efficientnet-lite0", folder / "coffee.jpg")
    expect(answer.locator(".bar").first).to_contain_text("espresso")
    expect(answer.locator(".timing")).to_contain_text("compute")
    code = answer.locator(".snippets pre")
    expect(code).to_contain_text('image=@"coffee.jpg"')
    expect(code).to_contain_text("model=efficientnet-lite0")
    page.get_by_role("button", name="Python").click()
    expect(code).to_contain_text("httpx.post")
    drop(page, page.locator("#result"), folder / "rocket.jpg")
    expect(answer.locator(".bar").first).to_contain_text("missile")
    expect(code).to_contain_text('open("rocket.jpg", "rb")')  # still in Python
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(COPY)
    page.keyboard.press("Control+V")
    expect(answer.locator(".bar").first).to_contain_text("cat")
    (folder / "clip.mp4").write_bytes(b"no clip")
    page.get_by_label("Photo or clip").set_input_files(folder / "clip.mp4")
    expect(code).to_contain_text('("video", open("clip.mp4", "rb"))')


@pytest.mark.weights
def test_the_shown_requests_run_as_they_are(page: Page, folder: Path) -> None:
    """In a shell, in Python and, if it is installed, in Node, from the photo's folder, whatever the
    labels and the file's name are."""
    labels = ["it's a cat", '"quoted" $HOME', "`a` \\ cup", "@cup", "<cup", "cup;type=a/b"]
    photo = (folder / "coffee.jpg").rename(folder / 'it\'s, a "cup";\\1.jpg')
    page.get_by_role("tab", name="Zero-shot").click()
    page.get_by_label("Labels").fill(", ".join(labels))
    answer = choose(page, "Zero-shot", "lite0-minilm", photo)
    expect(answer.locator(".bar")).to_have_count(len(labels))
    code = answer.locator(".snippets pre")
    shown = {}
    for language in ("curl", "Python", "JavaScript"):
        answer.get_by_role("button", name=language, exact=True).click()
        shown[language] = code.inner_text()
    (folder / "request.mjs").write_text(shown["JavaScript"])
    commands: dict[str, list[str]] = {
        "curl": ["bash", "-c", shown["curl"]],
        "Python": [sys.executable, "-c", shown["Python"]],
    }
    if node := shutil.which("node"):
        commands["JavaScript"] = [node, "request.mjs"]
    for command in commands.values():
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"VITRAIL_API_KEY": "admin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("score") == len(labels), done.stdout
        for text in ("it's a cat", "$HOME", "@cup", "<cup", "cup;type=a/b"):
            assert text in done.stdout


@pytest.mark.weights
def test_two_models_answer_side_by_side(page: Page, folder: Path) -> None:
    choose(page, "Classify", "efficientnet-lite0", folder / "coffee.jpg")
    page.get_by_label("Model to compare with").select_option("stamps")
    answers = page.get_by_role("article")
    expect(answers).to_have_count(2)
    expect(answers.nth(0).locator(".bar").first).to_contain_text("espresso")
    expect(answers.nth(1).get_by_role("heading")).to_have_text("stamps")
    expect(answers.nth(1).locator(".bar").first).to_be_visible()
    shoot(page, "compare")
    boxes = [answers.nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]


@pytest.mark.weights
def test_a_mask_has_classes_opacity_and_a_threshold(page: Page, folder: Path) -> None:
    answer = choose(page, "Segment", "dinov2-focus", folder / "astronaut.jpg")
    mask = answer.get_by_role("img", name="mask of")
    before = pixels(mask)
    shoot(page, "segment")
    answer.get_by_role("checkbox", name="foreground").uncheck()
    hidden = pixels(mask)
    assert hidden != before
    answer.get_by_role("checkbox", name="background").check()
    assert pixels(mask) not in (before, hidden)
    answer.get_by_role("checkbox", name="foreground").check()
    answer.get_by_role("checkbox", name="background").uncheck()
    assert pixels(mask) == before
    answer.get_by_label("Opacity").fill("0.2")
    assert mask.evaluate("canvas => getComputedStyle(canvas).opacity") == "0.2"
    with page.expect_response("**/segment"):
        page.get_by_label("Threshold").fill("0.95")
    expect(answer.locator(".snippets pre")).to_contain_text("threshold=0.95")
    assert pixels(mask) != before  # switches and opacity stay as they are


@pytest.mark.weights
def test_labels_are_sent_to_models_that_take_them_alone(page: Page, folder: Path) -> None:
    page.get_by_role("tab", name="Zero-shot").click()
    page.get_by_label("Labels").fill("")
    page.get_by_label("Photo or clip").set_input_files(folder / "astronaut.jpg")
    expect(page.locator("#answers")).to_have_text(
        "Type labels, such as: a cat, a dog, a cup of coffee."
    )
    page.get_by_label("Labels").fill("a cat, a person")
    expect(page.get_by_role("article").locator(".bar")).to_have_count(2)
    answer = choose(page, "Segment", "dinov2-focus", folder / "astronaut.jpg")
    expect(page.get_by_label("Labels")).to_be_hidden()
    expect(answer.get_by_role("img", name="mask of")).to_be_visible()


@pytest.mark.weights
def test_attention_is_shown_for_each_head(page: Page, folder: Path) -> None:
    answer = choose(page, "Attention", "dinov2-focus", folder / "astronaut.jpg")
    heads = answer.locator(".heads button")
    expect(heads).to_have_count(7)  # six and their mean
    assert len({pixels(heads.nth(number).locator("canvas")) for number in range(7)}) == 7
    shoot(page, "attention")
    heads.nth(3).click()
    expect(heads.nth(3)).to_have_attribute("aria-pressed", "true")


@pytest.mark.weights
def test_a_clicked_patch_shows_similar_patches(page: Page, folder: Path) -> None:
    halves = Image.new("RGB", (448, 448), (200, 30, 30))
    halves.paste((20, 40, 200), (224, 0, 448, 448))
    halves.save(folder / "halves.png")
    answer = choose(page, "Similar patches", "efficientnet-lite0-embed", folder / "halves.png")
    canvas, said = answer.locator("canvas"), answer.locator(".nearest")
    expect(said).to_contain_text("Row 4, column 4 of 7 x 7")
    box = canvas.bounding_box()
    assert box is not None
    canvas.click(position={"x": box["width"] * 0.95, "y": box["height"] * 0.5})
    expect(said).to_contain_text("Row 4, column 7 of 7 x 7")
    nearest = re.findall(r"row \d+, column (\d+)", said.inner_text())
    assert len(nearest) == 5
    assert all(int(column) >= 5 for column in nearest)  # the blue half
    before = pixels(canvas)
    canvas.press("ArrowLeft")
    expect(said).to_contain_text("Row 4, column 6")
    assert pixels(canvas) != before
    answer = choose(page, "Similar patches", "dinov2-focus-embed", folder / "astronaut.jpg")
    expect(answer.locator(".nearest")).to_contain_text("of 16 x 16")
    shoot(page, "patches")


@pytest.mark.weights
def test_hidden_patches_are_predicted_for_a_share_and_a_seed(page: Page, folder: Path) -> None:
    answer = choose(page, "Reconstruct", "tiny-mae", folder / "coffee.jpg")
    seen = answer.get_by_role("img", name="seen")
    pictures = [seen.get_attribute("src")]
    for label, value, field in (("Hidden share", "0.9", "mask_ratio=0.9"), ("Seed", "7", "seed=7")):
        page.get_by_label(label).fill(value)
        expect(answer.locator(".snippets pre")).to_contain_text(field)
        pictures.append(seen.get_attribute("src"))
    assert len(set(pictures)) == 3


@pytest.mark.weights
def test_labels_are_scored_while_they_are_typed(page: Page) -> None:
    page.get_by_role("button", name="Sample: astronaut").click()
    page.get_by_role("tab", name="Zero-shot").click()
    page.get_by_label("Labels").fill("an astronaut, a cup of coffee")
    answer = choose(page, "Zero-shot", "lite0-minilm")
    expect(answer.locator(".bar")).to_have_count(2)
    page.get_by_label("Labels").fill("an astronaut, a cup of coffee, <b>a cat</b>")
    expect(answer.locator(".bar")).to_have_count(3)
    expect(answer).to_contain_text("<b>a cat</b>")  # as text


@pytest.mark.weights
def test_piles_are_filled_and_fitting_needs_a_key(page: Page, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Classes of your own").click()
    for number, label in enumerate(("red", "blue"), 1):
        (tmp_path / label).mkdir()
        (tmp_path / label / "notes.txt").touch()
        for seed in range(3):
            (tmp_path / label / f"{label}-{seed}.png").write_bytes(tinted(label, seed))
        drop(page, page.locator(".pile").nth(number - 1), tmp_path / label)
        expect(page.get_by_label(f"Name of class {number}")).to_have_value(label)  # the folder's
        first = page.get_by_role("button", name=f"Remove {label}-0.png")
        page.get_by_label(f"Photos of class {number}").set_input_files(
            tmp_path / label / f"{label}-0.png"
        )
        expect(first).to_have_count(2)
        first.first.click()
        expect(first).to_have_count(1)
    page.get_by_role("button", name="Remove red-1.png").drag_to(page.locator(".pile").nth(1))
    photos = [page.locator(".pile").nth(number).locator(".photo") for number in (0, 1)]
    expect(photos[0]).to_have_count(2)
    expect(photos[1]).to_have_count(4)
    drop(page, page.locator("h1"), tmp_path / "red" / "red-0.png")  # the page stays
    page.get_by_label("API key").fill("")
    page.get_by_role("button", name="Fit").click()
    expect(page.locator("#classes .error")).to_contain_text("the field at the top of the page")
    expect(page.locator("#fit-request pre")).to_contain_text("label=red")


@pytest.mark.weights
def test_photos_are_indexed_and_found_by_words_and_by_a_photo(page: Page, folder: Path) -> None:
    page.get_by_role("tab", name="Search").click()
    page.locator("#collection select").select_option("lite0-minilm")
    expect(page.locator("#indexed")).to_contain_text("no collection photos")
    (folder / "notes.txt").touch()
    page.get_by_label("Photos to add").set_input_files(folder / "notes.txt")
    expect(page.locator("#indexed")).to_contain_text("No images")
    (folder / "space").mkdir()
    for name in ("astronaut", "rocket"):
        (folder / f"{name}.jpg").rename(folder / "space" / f"{name}.jpg")
    drop(page, page.locator("#collection .drop").first, folder)
    expect(page.locator("#indexed")).to_contain_text("4 photos in photos")
    code = page.locator("#search-request pre")
    expect(code).to_contain_text("/collections/photos/images")
    page.get_by_label("Words to search for").fill("a cup of coffee")
    page.locator("#query").get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#hits figcaption").first).to_contain_text("coffee.jpg")
    expect(code).to_contain_text('"text":"a cup of coffee"')
    page.get_by_label("Photo to search by").set_input_files(folder / "space" / "rocket.jpg")
    expect(page.locator("#hits figcaption").first).to_contain_text("rocket.jpg 1.000")
    expect(page.locator("#hits img")).to_have_count(4)
    page.get_by_label("Search in").select_option("folder")
    page.get_by_label("Value of the field").fill("space")
    page.get_by_label("Value of the field").press("Tab")
    expect(page.locator("#hits img")).to_have_count(2)
    expect(code).to_contain_text('filter={"folder":"space"}')
    page.get_by_label("Words to search for").fill("a cup of coffee")
    page.get_by_label("Words to search for").press("Enter")
    expect(code).to_contain_text('"filter":{"folder":"space"}')
    expect(page.locator("#hits img")).to_have_count(2)


@pytest.mark.weights
def test_a_transparent_photo_is_shown_on_white_and_a_late_answer_not_at_all(
    page: Page, tmp_path: Path
) -> None:
    for name, size in (("clear", (300, 201)), ("wide", (301, 200))):
        Image.new("RGBA", size, (0, 0, 0, 0)).save(tmp_path / f"{name}.png")
    page.get_by_role("tab", name="Search").click()
    name_collection(page, "clear")
    page.get_by_label("Photos to add").set_input_files(sorted(tmp_path.glob("*.png")))
    expect(page.locator("#indexed")).to_contain_text("2 photos in clear")
    page.get_by_label("Photo to search by").set_input_files(tmp_path / "clear.png")
    expect(page.locator("#hits img")).to_have_count(2)
    for hit in page.locator("#hits img").all():
        encoded = (hit.get_attribute("src") or "").partition(",")[2]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as shown:
            assert shown.format == "JPEG"
            assert min(shown.convert("L").tobytes()) > 250
    held: list[Route] = []
    page.route("**/search", lambda route: route.continue_() if held else held.append(route))
    words = page.get_by_label("Words to search for")
    for text in ("first", "second"):
        words.fill(text)
        words.press("Enter")
    code = page.locator("#search-request pre")
    expect(code).to_contain_text('"text":"second"')
    with page.expect_response("**/search"):
        held[0].continue_()
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    expect(code).to_contain_text('"text":"second"')


@pytest.mark.weights
def test_someone_without_photos_fits_and_searches_the_samples(page: Page) -> None:
    """The guide's first five minutes, click by click."""
    page.get_by_role("button", name="Sample: coffee").click()
    expect(page.get_by_role("article").locator(".bar").first).to_contain_text("espresso")
    shoot(page, "classify")
    page.get_by_role("tab", name="Classes of your own").click()
    page.get_by_role("button", name="Fit").click()
    expect(page.locator("#fitted .error")).to_contain_text("need photos")
    page.get_by_role("button", name="Use sample piles").click()
    expect(page.get_by_role("button", name=re.compile("Remove .*jpg"))).to_have_count(24)
    page.get_by_role("button", name="Fit").click()
    expect(page.locator("#progress")).to_contain_text("my-classes is ready", timeout=60_000)
    expect(page.get_by_role("img", name="How accuracy grew")).to_be_visible()
    page.get_by_role("button", name="Try grass-9.jpg").click()  # it was in no pile
    expect(page.locator("#fitted .bar").first).to_contain_text("grass")
    shoot(page, "classes")
    page.once("dialog", lambda dialog: dialog.accept())
    with page.expect_event("dialog") as asked, page.expect_response("**/heads") as answer:
        page.get_by_role("button", name="Fit").click()
    assert asked.value.message == "There is a head my-classes. Replace it?"
    assert answer.value.status == 202
    expect(page.locator("#progress")).to_contain_text("my-classes is ready", timeout=60_000)
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Collection", exact=True).fill("samples")
    page.get_by_role("button", name="Index the samples").click()
    expect(page.locator("#indexed")).to_contain_text("11 photos in samples")
    page.get_by_label("Words to search for").fill("a cup of coffee")
    page.get_by_label("Words to search for").press("Enter")
    best = page.locator("#hits figcaption").first
    expect(best).to_contain_text("coffee.jpg")
    shoot(page, "search")
    page.get_by_role("button", name="Sample: rocket").click()
    expect(best).to_contain_text("rocket.jpg 1.000")
    page.reload()
    page.get_by_label("API key").fill("admin")
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Collection", exact=True).fill("samples")
    page.get_by_role("button", name="Sample: cat").click()
    expect(best).to_contain_text("cat.jpg")
    expect(page.locator("#hits img")).to_have_count(11)  # from their thumbnails
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the collection").click()
    expect(page.locator("#indexed")).to_contain_text("There is no collection samples yet")


@pytest.mark.weights
def test_the_camera_is_answered_live_and_its_last_photo_kept(page: Page) -> None:
    page.get_by_role("button", name="Live camera").click()  # Chromium's own moving picture
    answer = page.get_by_role("article")
    expect(answer.locator(".bar")).to_have_count(5)
    expect(page.locator("#preview video")).to_be_visible()
    for _ in range(2):
        with page.expect_response("**/classify"):
            pass
    page.get_by_role("button", name="Stop and keep the photo").click()
    expect(page.get_by_role("img", name="Your photo")).to_be_visible()
    expect(page.get_by_role("button", name="Live camera")).to_be_visible()
    page.get_by_role("button", name="Ask").click()
    expect(answer.locator(".snippets pre")).to_contain_text("camera.jpg")


@pytest.mark.weights
def test_models_are_unloaded_and_loaded_by_keyboard(page: Page) -> None:
    page.get_by_role("tab", name="Try", exact=True).focus()
    page.keyboard.press("ArrowLeft")  # the last tab
    page.get_by_role("button", name="Unload stamps").click()
    page.get_by_role("button", name="Load stamps", exact=True).click()
    expect(page.get_by_role("button", name="Unload stamps")).to_be_visible()
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Unload stamps").click()
    expect(page.locator("#models-error")).to_contain_text("403")


@pytest.mark.weights
def test_what_the_server_does_is_shown_live(page: Page, own_demo: httpx.Client) -> None:
    page.get_by_role("tab", name="Models").click()
    requests = page.locator("#live [data-name='requests a second'] dd")
    expect(requests).to_have_text("0")
    expect(page.locator("#live dt")).to_have_count(5)
    sample = own_demo.get("/assets/samples/coffee.jpg").content
    headers = {"Content-Type": "image/jpeg"}
    assert own_demo.post("/classify", content=sample, headers=headers).is_success
    expect(requests).not_to_have_text("0")
    shoot(page, "models")
    button = page.get_by_role("button", name="Unload stamps")
    button.focus()
    with page.expect_response("**/metrics"):
        pass
    expect(button).to_be_focused()  # a row keeps the focus while the table is drawn again


@pytest.mark.weights
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing(page: Page, folder: Path, look: str) -> None:
    page.emulate_media(color_scheme="dark" if look == "dark" else "light")
    if look == "phone":
        page.set_viewport_size({"width": 360, "height": 740})
    found: list[str] = []

    def check(place: str) -> None:
        results = Axe().run(page)
        found.extend(
            f"{place}: {each['id']}: {each['nodes']}" for each in results.response["violations"]
        )
        if look == "phone":
            wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
            assert not wide, f"{place} scrolls sideways"

    page.get_by_label("Photo or clip").set_input_files(folder / "coffee.jpg")
    for task, model in (
        ("Classify", "efficientnet-lite0"),
        ("Zero-shot", "lite0-minilm"),
        ("Segment", "dinov2-focus"),
        ("Attention", "dinov2-focus"),
        ("Similar patches", "dinov2-focus-embed"),
        ("Reconstruct", "tiny-mae"),
        ("Embed", "efficientnet-lite0-embed"),
    ):
        choose(page, task, model)
        check(task)
    page.get_by_label("Model to compare with").select_option("lite0-minilm")
    expect(page.get_by_role("article")).to_have_count(2)
    check("two models")
    page.get_by_role("tab", name="Classes of your own").click()
    page.get_by_role("button", name="Use sample piles").click()
    expect(page.get_by_role("button", name="Remove brick-1.jpg")).to_be_visible()
    check("Classes of your own")
    page.get_by_role("tab", name="Search").click()
    name_collection(page, f"axe-{look}")
    drop(page, page.locator("#collection .drop").first, folder)
    expect(page.locator("#indexed")).to_contain_text(f"4 photos in axe-{look}")
    page.get_by_label("Search in").select_option("folder")
    page.get_by_label("Photo to search by").set_input_files(folder / "coffee.jpg")
    expect(page.locator("#hits img")).to_have_count(4)
    check("Search")
    page.get_by_role("tab", name="Models").click()
    check("Models")
    assert found == []
