"""The command line as a user types it, against a real server with the demo's weights.

A process takes seconds to start, so most commands run in this one.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from models import load_checkpoint
from models.catalog import load_catalog
from service.cli import app
from service.cli.index import IndexWriter, MadeBy, read_index
from service.cli.retrieval import _condition
from tests.conftest import answers, free_port, process, running, wait_until
from tests.models.test_fixtures import GOLDENS
from tests.service.test_heads import tinted

Done = subprocess.CompletedProcess[str]


def vitrail(*arguments: str) -> Done:
    """Run a command in this process. An exception that it does not report fails the test."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return Done(arguments, done.exit_code, done.stdout, done.stderr)


def vitrail_process(*arguments: str) -> Done:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, jpegs: dict[str, bytes]) -> Path:
    made = tmp_path_factory.mktemp("photos")
    for name, content in jpegs.items():
        (made / f"{name}.jpg").write_bytes(content)
    (made / "notes.txt").write_text("no image")
    return made


def test_classify_names_the_cat(demo_server: str, folder: Path) -> None:
    done = vitrail_process("classify", str(folder / "chelsea.jpg"), "--url", demo_server)
    assert done.returncode == 0, done.stderr
    assert "cat" in done.stdout


def test_a_folder_is_its_images_in_order_and_json_is_a_line_each(
    demo_server: str, folder: Path
) -> None:
    done = vitrail("classify", str(folder), "--url", demo_server, "--json", "--top-k", "2")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = [Path(row["path"]).stem for row in rows]
    assert names == ["astronaut", "chelsea", "coffee", "rocket"]
    assert rows[2]["predictions"][0]["label"] == "espresso"
    assert all(len(row["predictions"]) == 2 for row in rows)


def test_embeddings_go_to_npy_and_parquet(demo_server: str, folder: Path, tmp_path: Path) -> None:
    for name in ("vectors.npy", "vectors.parquet"):
        done = vitrail("embed", str(folder), "--url", demo_server, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (4, 1280)
    paths = (tmp_path / "vectors.paths.txt").read_text().splitlines()
    table = pq.read_table(tmp_path / "vectors.parquet").to_pydict()
    assert table["path"] == paths
    # the two runs may batch differently
    assert np.allclose(table["embedding"], vectors, atol=1e-6)


def test_zero_shot_scores_labels_of_ones_own(demo_server: str, folder: Path) -> None:
    labels = [part for label in ("cat", "dog", "car", "coffee", "rocket")
              for part in ("--labels", label)]  # fmt: skip
    done = vitrail("zero-shot", str(folder), *labels, "--url", demo_server, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    best = {Path(row["path"]).stem: row["predictions"][0]["label"] for row in rows}
    assert best["chelsea"] == "cat"
    assert best["coffee"] == "coffee"
    assert best["rocket"] == "rocket"


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.parquet"])
def test_photos_are_found_by_text_and_by_image(
    demo_server: str, folder: Path, tmp_path: Path, name: str
) -> None:
    index = str(tmp_path / name)
    server = ("--url", demo_server)
    embedded = vitrail("embed", str(folder), "--model", "lite0-minilm", "--output", index, *server)
    assert embedded.returncode == 0, embedded.stderr
    for text, wanted in (("a cat", "chelsea"), ("a cup of coffee", "coffee")):
        found = vitrail("search", index, "--text", text, "--top", "2", *server)
        assert found.returncode == 0, found.stderr
        best = found.stdout.splitlines()[0]
        assert wanted in best
    photo = folder / "rocket.jpg"
    same = vitrail("search", index, "--image", str(photo), "--json", *server)
    first = json.loads(same.stdout.splitlines()[0])
    assert Path(first["path"]) == photo
    assert first["score"] == pytest.approx(1, abs=1e-4)
    assert vitrail("search", index, *server).returncode == 2
    no_index = vitrail("search", str(photo), "--text", "a cat", *server)
    assert no_index.returncode == 1
    assert "not an index" in no_index.stderr


def test_a_collection_is_indexed_and_searched(demo_server: str, folder: Path) -> None:
    server = ("--url", demo_server)
    arguments = ("index", str(folder), "--collection", "photos", "--model", "lite0-minilm")
    indexed = vitrail(*arguments, *server)
    assert indexed.returncode == 0, indexed.stderr
    assert "4 images added, 0 unchanged, 4 in photos" in indexed.stderr
    found = vitrail("search", "photos", "--text", "a cup of coffee", "--top", "2", *server)
    assert found.stdout.splitlines()[0].endswith(str(folder / "coffee.jpg"))
    image = str(folder / "rocket.jpg")
    same = vitrail("search", "photos", "--image", image, "--json", *server)
    assert json.loads(same.stdout.splitlines()[0])["path"] == image
    inside = ("search", "photos", "--image", image, "--where")
    none = vitrail(*inside, "folder=elsewhere", *server)
    assert (none.returncode, none.stdout) == (0, "")
    there = vitrail(*inside, f"folder={folder.name}", *server)
    assert there.stdout.startswith(f"1.000  {image}")
    missing = vitrail("search", "none", "--text", "a cat", *server)
    assert missing.returncode == 1
    assert "no collection 'none'" in missing.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("folder=2024", "2024"),
        ("folder=null", "null"),
        ('folder="2024"', "2024"),
        ("year=2024", 2024),
        ("year=-2.5", -2.5),
        ('year="2024"', "2024"),
        ("year=1e999", "1e999"),
        ("year=NaN", "NaN"),
        ("year=[1]", "[1]"),
        ("year=" + "[" * 100_000, "[" * 100_000),
        ("year=" + "9" * 400, int("9" * 400)),
        ("seen=true", True),
        ("seen=null", None),
        ("seen=a=b", "a=b"),
    ],
)
def test_a_folder_is_text_and_numbers_are_finite(text: str, value: object) -> None:
    field, known = _condition(text)
    assert (field, known) == (text.partition("=")[0], value)
    assert type(known) is type(value)


def test_an_interrupted_embedding_is_resumed_exactly(tiny_catalog: Path, tmp_path: Path) -> None:
    """Killed in the middle, then run again: the file is that of a run without a break."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(800):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:04}.png")
    (photos / "0100.png").write_bytes(b"no image")
    with running(tiny_catalog) as server:
        server.wait_ready()
        flags = ["--url", server.url, "--model", "tiny-embed"]
        whole = tmp_path / "whole.parquet"
        once = vitrail("embed", str(photos), "--output", str(whole), *flags)
        assert once.returncode == 1  # for the image that is none
        assert "0100.png" in once.stderr
        broken = tmp_path / "broken.parquet"
        parts = tmp_path / "broken.parquet.parts"
        with process("embed", str(photos), "--output", str(broken), *flags) as started:
            wait_until(lambda: (parts / "000000.parquet").exists())
            started.kill()
            started.wait()
        assert not broken.exists()
        asked = server.metric("vitrail_requests_total", task="embed", outcome="ok")
        again = vitrail("embed", str(photos), "--output", str(broken), *flags)
        assert "done already" in again.stderr
        assert again.returncode == 1
        assert "0100.png" in again.stderr  # it has failed before, and is tried again
        assert server.metric("vitrail_requests_total", task="embed", outcome="ok") - asked < 500
        assert not parts.exists()
        first, second = (pq.read_table(path).to_pydict() for path in (whole, broken))
        assert len(first["path"]) == 799
        assert first["path"] == second["path"]
        assert np.allclose(first["embedding"], second["embedding"], atol=1e-5)

        (tmp_path / "other.parquet.parts").mkdir()
        note = {"model": "tiny", "model_digest": "sha256:old", "preprocess_digest": "x"}
        (tmp_path / "other.parquet.parts/made_by.json").write_text(json.dumps(note))
        other = vitrail("embed", str(photos), "--output", str(tmp_path / "other.parquet"), *flags)
        assert other.returncode == 1
        assert "was begun with model tiny" in other.stderr


@pytest.mark.parametrize("name", ["a.parquet", "a.npy"])
def test_the_parts_of_an_earlier_version_are_continued(tmp_path: Path, name: str) -> None:
    """They had a column of errors, and rows of images that failed."""
    output = tmp_path / name
    (parts := tmp_path / f"{name}.parts").mkdir()
    old = {"path": ["1", "2"], "embedding": [[1.0, 2.0], None], "error": [None, "no image"]}
    pq.write_table(pa.table(old), parts / "000000.parquet")
    writer = IndexWriter(output)
    assert writer.done() == {"1"}
    writer.check(MadeBy("m", "sha256:m", "sha256:p"))
    writer.add("2", [3.0, 4.0])
    assert writer.finish() == 2
    index = read_index(output)
    assert index.paths == ["1", "2"]
    assert np.array_equal(index.vectors, [[1, 2], [3, 4]])


def test_an_index_is_brought_up_to_date(tiny_catalog: Path, tmp_path: Path) -> None:
    """Only what is new or changed is embedded, also after SIGKILL; what is gone goes if asked."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(200):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:03}.png")
    settings: dict[str, Any] = {
        "collections": str(tmp_path / "store"),
        "image_folders": str(photos),
    }
    with running(tiny_catalog, models=("tiny-embed",), **settings) as server:
        server.wait_ready()
        command = ["index", str(photos), "--url", server.url, "--model", "tiny-embed"]

        def stored() -> int:
            found = server.client.get("/collections/c").json()
            return int(found.get("images", 0))

        def index(*flags: str) -> tuple[int, str]:
            done = vitrail(*command, "--collection", "c", *flags)
            return done.returncode, done.stderr

        with process(*command, "--collection", "c") as started:
            wait_until(lambda: stored() > 0)
            started.kill()
            started.wait()
        code, text = index()
        assert code == 0, text
        counts = re.search(r"(\d+) images added, (\d+) unchanged, 200 in c", text)
        assert counts is not None, text
        added, unchanged = map(int, counts.groups())
        assert added + unchanged == 200
        assert unchanged > 0

        (photos / "000.png").unlink()
        (photos / "001.png").write_bytes((photos / "002.png").read_bytes() + b" ")
        (photos / "broken.jpg").write_bytes(b"no image")
        embedded = server.metric("vitrail_images_total", task="embed", outcome="ok")
        code, text = index()
        assert code == 1
        assert f"{photos}/broken.jpg: not an image" in text
        assert "1 images added, 198 unchanged, 200 in c" in text
        assert server.metric("vitrail_images_total", task="embed", outcome="ok") == embedded + 1
        code, text = index("--delete")
        assert "0 images added, 199 unchanged, 1 deleted, 199 in c" in text
        code, text = index("--on-server", "--delete")
        assert code == 1
        assert f"{photos}/broken.jpg: not an image" in text
        assert "0 images added, 199 unchanged, 0 deleted, 199 in c" in text
        command[1] = f"{photos}/../photos"
        code, text = index()
        assert "0 images added, 199 unchanged, 199 in c" in text


def test_masks_go_to_a_folder(demo_server: str, folder: Path, tmp_path: Path) -> None:
    into = ("--url", demo_server, "--output", str(tmp_path / "m"))
    done = vitrail("segment", str(folder), *into, "--overlays", "--min-area", "50")
    assert done.returncode == 0, done.stderr
    overlays = sorted((tmp_path / "m").glob("*.overlay.png"))
    masks = sorted(set((tmp_path / "m").glob("*.png")) - set(overlays))
    assert len(masks) == len(overlays) == 4
    assert masks[1].name == f"{folder.name}_chelsea.png"
    for path in (masks[1], overlays[1]):
        with Image.open(path) as picture:
            assert picture.size == (451, 300)
    done = vitrail("segment", str(folder), "--url", demo_server, "--overlays")
    assert done.returncode == 2
    assert "needs a folder" in done.stderr


def test_every_task_with_images_has_a_command(tiny_catalog: Path, folder: Path) -> None:
    photo = str(folder / "coffee.jpg")
    with running(tiny_catalog) as server:
        server.wait_ready()
        flags = ("--url", server.url)
        shown = vitrail(
            "attention", photo, "--head", "0", "--form", "map", *flags, "--model", "tiny"
        )
        assert shown.returncode == 0, shown.stderr
        assert "heads of" in shown.stdout
        refused = vitrail("reconstruct", photo, "--mask-ratio", "0.5", *flags, "--model", "tiny")
        assert refused.returncode == 1
        assert "422" in refused.stderr
        plain = vitrail("embed", photo, "--no-normalize", "--json", *flags)
        norm = np.linalg.norm(json.loads(plain.stdout)["embedding"])
        assert abs(norm - 1) > 1e-3
    wrong = vitrail("attention", photo, "--form", "picture")
    assert wrong.returncode == 2
    assert "overlay" in wrong.stderr


def test_a_bad_file_is_told_and_the_others_are_answered(
    demo_server: str, folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    done = vitrail("classify", str(bad), str(folder / "coffee.jpg"), "--url", demo_server)
    assert done.returncode == 1
    assert "422" in done.stderr
    assert "espresso" in done.stdout


def test_no_server_is_told_at_once(folder: Path) -> None:
    nowhere = vitrail_process("classify", str(folder), "--url", f"http://127.0.0.1:{free_port()}")
    assert nowhere.returncode == 1
    assert "`vitrail serve` starts one" in nowhere.stderr
    assert len(nowhere.stderr.splitlines()) == 1
    wrong = vitrail("index", str(folder), "--collection", "c", "--url", "localhost:8000")
    assert wrong.returncode == 2
    assert "is not a URL" in re.sub(r"[\s│]+", " ", wrong.stderr)


def test_a_built_in_catalog_can_be_copied_but_not_over_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    assert vitrail("models", "copy", "published", str(mine)).returncode == 0
    assert load_catalog(mine).models == load_catalog("published").models
    again = vitrail("models", "copy", "demo", str(mine))
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert load_catalog(mine).models == load_catalog("published").models
    unknown = vitrail("models", "copy", "nothing", str(tmp_path / "other.toml"))
    assert unknown.returncode == 1
    assert "built-in: demo, hub, published" in unknown.stderr


def test_models_are_listed_pulled_and_inspected(tiny_catalog: Path) -> None:
    listed = json.loads(vitrail("models", "list", "--catalog", "hub", "--json").stdout)
    assert len(listed) > 60
    assert "efficientnet-lite0" in vitrail("models", "list").stdout
    pulled = vitrail("models", "pull", "tiny", "--catalog", str(tiny_catalog))
    assert "tiny: ready" in pulled.stdout
    file = str(tiny_catalog.parent / "tiny.safetensors")
    found = json.loads(
        vitrail("models", "inspect", file, "--architecture", "test_vit", "--json").stdout
    )
    assert found["format"] == "timm"
    assert found["classes"] == 1000
    assert found["parameters"] > 100_000
    unknown = vitrail("models", "inspect", file)
    assert unknown.returncode == 1
    assert "--architecture" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_wrong_settings_end_the_start_with_a_line_each() -> None:
    done = vitrail_process("serve", "--port", "99999")
    assert done.returncode == 2
    assert done.stderr.startswith("vitrail: VITRAIL_PORT: ")
    done = vitrail_process("serve", "--catalog", "nowhere.toml")
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_ends_the_start_with_a_line(tiny_catalog: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags in (["serve", "--grpc-port", port], ["worker", "--port", port]):
            done = vitrail_process(*flags, "--catalog", str(tiny_catalog))
            assert done.returncode == 2
            assert any(line.startswith("vitrail: ") for line in done.stderr.splitlines())
            assert port in done.stderr
            assert "Traceback" not in done.stderr


def test_sigterm_answers_everything_accepted(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("serve", "--port", str(port), "--catalog", str(tiny_catalog))
    # every batch waits a while, so that the signal finds requests in all stages
    environment = {"VITRAIL_MAX_QUEUE_DELAY_MS": "700", "VITRAIL_LOG_LEVEL": "warning"}
    with process(*arguments, **environment) as server:
        wait_until(lambda: answers(f"{url}/readyz"))
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(
                httpx.post(f"{url}/classify", content=jpegs["coffee"], timeout=30).status_code
            )

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()

        def waiting() -> float:
            text = httpx.get(f"{url}/metrics").text
            found = [
                li for li in text.splitlines() if li.startswith('vitrail_queue_depth{trunk="tiny"')
            ]
            return float(found[0].split()[-1])

        wait_until(lambda: waiting() > 0 and len(statuses) + waiting() >= 12)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert statuses == [200] * 12
        assert server.wait(30) == 0
        assert not answers(f"{url}/healthz")


def test_a_head_is_fitted_and_served(tiny_catalog: Path, tmp_path: Path) -> None:
    """From a folder of classes to a running server, by its user's two commands."""
    for label in ("red", "blue"):
        (tmp_path / "tints" / label).mkdir(parents=True)
        for seed in range(12):
            (tmp_path / "tints" / label / f"{seed}.png").write_bytes(tinted(label, seed))
    (tmp_path / "tints" / "red" / "broken.png").write_bytes(b"broken")
    arguments = ["fit", str(tmp_path / "tints"), "--trunk", "tiny", "--name", "tints"]
    arguments += ["--catalog", str(tiny_catalog), "--epochs", "4"]
    arguments += ["--output", str(tmp_path / "out")]
    with running(tiny_catalog, heads_folder=str(tmp_path / "heads")) as server:
        server.wait_ready()
        done = vitrail_process(*arguments, "--url", server.url)
        assert done.returncode == 0, done.stderr
        assert "skipped red/broken.png" in done.stderr
        assert f"tints is served by {server.url}" in done.stdout
        answer = vitrail(
            "classify", str(tmp_path / "tints/blue/1.png"), "--model", "tints", "--url", server.url
        )
        assert answer.stdout.split(": ")[1].startswith("blue")
        again = vitrail(*arguments, "--url", server.url)
        assert again.returncode == 1
        assert "a head 'tints' already exists" in again.stderr
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"tints.safetensors", "report.json", "curve.png", "confusion.png"}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["holdout_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trunk", "nowhere"], "no trunk 'nowhere'"),
        (["--trunk", "tiny", "--kind", "magic"], "kind is 'magic'"),
        (["--trunk", "conv", "--kind", "vqt"], "blocks of a plain ViT"),
        (["--trunk", "tiny"], "a single image of red"),
    ],
)
def test_a_fit_that_cannot_be_says_why(
    tiny_catalog: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    for name in ("red/1.png", "blue/1.png", "blue/2.png"):
        (tmp_path / "few" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "few" / name).write_bytes(tinted("red", 1))
    catalog = ["--catalog", str(tiny_catalog), "--output", str(tmp_path / "out")]
    done = vitrail("fit", str(tmp_path / "few"), "--name", "x", *catalog, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_converted_to_one_that_says_everything(tmp_path: Path) -> None:
    """Heads, positions and heads' settings included: the file alone gives the same answers."""
    checkpoint = GOLDENS / "vqt" / "checkpoint.pth"
    if not checkpoint.is_file():
        pytest.skip("the fixture vqt is not here (shared/goldens)")
    target = tmp_path / "vqt.safetensors"
    done = vitrail_process(
        "models", "convert", str(checkpoint), str(target), "--set", "num_heads=4"
    )
    assert done.returncode == 0, done.stderr
    golden = load_file(GOLDENS / "vqt" / "golden.safetensors")
    logits = load_checkpoint(target).run(golden["pixel_values"])["logits"]
    assert np.allclose(logits, golden["logits"], atol=1e-5)
    found = json.loads(
        vitrail("models", "inspect", str(checkpoint), "--set", "num_heads=4", "--json").stdout
    )
    assert found["format"] == "vqt"
    refused = vitrail("models", "convert", str(checkpoint), str(tmp_path / "out.bin"))
    assert refused.returncode == 1
    assert "must end with .safetensors" in refused.stderr
