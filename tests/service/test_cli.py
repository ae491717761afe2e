"""The command line as a user types it, against a real server with the demo's weights."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import answers, free_port, process, wait_until


def vitrail(*arguments: str) -> subprocess.CompletedProcess[str]:
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
    done = vitrail("classify", str(folder / "chelsea.jpg"), "--url", demo_server)
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
    assert np.allclose(table["embedding"], vectors)


def test_masks_go_to_a_folder(demo_server: str, folder: Path, tmp_path: Path) -> None:
    done = vitrail("segment", str(folder), "--url", demo_server, "--output", str(tmp_path / "m"))
    assert done.returncode == 0, done.stderr
    masks = sorted((tmp_path / "m").glob("*.png"))
    assert len(masks) == 4
    with Image.open(masks[1]) as mask:
        assert mask.size == (451, 300)


def test_a_bad_file_is_told_and_the_others_are_answered(
    demo_server: str, folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    done = vitrail("classify", str(bad), str(folder / "coffee.jpg"), "--url", demo_server)
    assert done.returncode == 1
    assert "422" in done.stderr
    assert "espresso" in done.stdout


def test_no_server_is_told_without_a_traceback(folder: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = vitrail("classify", str(folder / "coffee.jpg"), "--url", url)
    assert done.returncode == 1
    assert "ConnectError" in done.stderr
    assert "Traceback" not in done.stderr


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
    done = vitrail("serve", "--port", "99999")
    assert done.returncode == 2
    assert done.stderr.startswith("port: ")
    done = vitrail("serve", "--catalog", "nowhere.toml")
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_ends_the_start_with_a_line(tiny_catalog: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags in (["serve", "--grpc-port", port], ["worker", "--port", port]):
            done = vitrail(*flags, "--catalog", str(tiny_catalog))
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
