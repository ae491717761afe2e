"""What a person sees in a terminal: the summary at start, tables, names of files, the doctor."""

import base64
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from models.catalog import load_catalog
from service.cli import app, retrieval, summary
from service.cli.client import show_picture
from service.cli.doctor import check_settings
from service.cli.pictures import Picture, picture_of
from service.cli.segment import file_names
from service.settings import Settings
from tests.conftest import Running, answers, encode, free_port, process, running, wait_until

VITRAIL = [sys.executable, "-m", "service.cli"]


def read_terminal(descriptor: int, until: str) -> str:
    """What a process writes to its terminal, until that text."""
    text = ""
    while until not in text:
        try:
            text += os.read(descriptor, 4096).decode(errors="replace")
        except OSError:  # the process has ended
            raise AssertionError(text) from None
    return text


def test_a_server_greets_a_person_with_a_summary(tiny_catalog: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ours, theirs = pty.openpty()
    command = [*VITRAIL, "serve", "--port", url.rpartition(":")[2], "--catalog", str(tiny_catalog)]
    with subprocess.Popen(command, stderr=theirs, env=os.environ | {"TERM": "dumb"}) as server:
        os.close(theirs)
        text = read_terminal(ours, "Ctrl-C")
        server.send_signal(signal.SIGUSR1)  # it has no workers to restart
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    os.close(ours)
    assert f"{url}/docs" in text
    assert re.search(r"tiny-embed +embed\* +eager +float32 +cpu", text)
    assert f"vitrail classify photo.jpg --url {url}" in text
    assert '{"time"' not in text


@pytest.mark.parametrize(("path", "called"), [("", ".venv/bin/vitrail"), (".venv/bin", "vitrail")])
def test_the_summary_names_a_command_that_works(
    path: str, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv/bin/vitrail"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/vitrail", "serve"])
    printed = io.StringIO()
    shown = summary.summary("http://127.0.0.1:8000", Settings(), [])
    Console(file=printed, width=100).print(shown)
    assert f" {called} classify photo.jpg" in printed.getvalue()


WALK = """
import fcntl, struct, termios
from service.cli import app
for columns in (60, 80, 120):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    for command in (["models", "list"], ["--help"]):
        print("$", columns, *command, flush=True)
        app(command, standalone_mode=False)
print("the end")
"""


def test_tables_and_help_fit_the_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment["TERM"] = "xterm"  # a dumb one has no width
    command = [sys.executable, "-c", WALK]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as walk:
        os.close(theirs)
        text = read_terminal(ours, "the end")
        assert walk.wait(60) == 0, text
    os.close(ours)
    names = load_catalog("demo").models.keys()
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    shown = re.findall(r"\$ (\d+) ([^\r\n]*)\r?\n([^$]*)", text)
    assert [(columns, command) for columns, command, _ in shown] == [
        (columns, command)
        for columns in ("60", "80", "120")
        for command in ("models list", "--help")
    ]
    for columns, command, output in shown:
        lines = output.splitlines()
        assert max(map(len, lines)) <= int(columns), output
        if command == "models list":  # a cell is whole or has whole words
            assert names <= {line.split()[0] for line in lines if line[:1].strip()}
            assert "…" not in output
            assert ("description" in output, "licence" in output) == (
                columns != "60",
                columns == "120",
            )


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, *path, name)


@pytest.mark.parametrize("path", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_the_help_of_every_command_is_whole_at_80_columns(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = CliRunner().invoke(app, [*path, "--help"]).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    # between the usage and the boxes: a line is not broken long before the terminal ends
    prose = [line.strip() for line in lines[2:] if not line.startswith(("╭", "│", "╰"))]
    for line, following in pairwise(prose):
        assert not line or not following or len(f" {line} {following.split()[0]}") > 70, line


def test_a_newcomer_sees_where_to_start_and_plain_errors() -> None:
    def said(*arguments: str) -> str:
        return CliRunner().invoke(app, arguments).output

    assert re.fullmatch(r"vitrail \d+\.\d+\.\d+\n", said("--version"))
    assert said("--help").index("Start here") < said("--help").index("Images, with a server")
    assert "create" in said("keys")  # its help
    refused = said("health", f"127.0.0.1:{free_port()}")
    assert "Connection refused" in refused
    assert len(refused.splitlines()) == 1


def test_health_of_an_http_port_says_that_it_does_not_speak_grpc(tiny: Running) -> None:
    address = str(tiny.client.base_url).removeprefix("http://")
    result = CliRunner().invoke(app, ["health", address])
    assert result.exit_code == 1
    assert result.output == (
        f"{address}: this port does not speak gRPC; the gRPC port is 8001 by default\n"
    )


def test_an_index_whose_server_goes_away_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":  # then it closes the connection without an answer
                self.send_response(200)
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = ["index", str(tmp_path), "--collection", "all", "--url", url]
        said = CliRunner().invoke(app, command)
        server.shutdown()
    assert said.exit_code == 1
    assert f"the server at {url} gave no answer" in said.output
    assert "run the command again" in said.output


@pytest.mark.nightly
@pytest.mark.weights
def test_the_demo_is_one_command() -> None:
    port = free_port()
    with process("demo", "--port", str(port), "--no-browser") as server:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 120)
        assert answers(f"http://127.0.0.1:{port}/")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_results_stand_on_lines_of_their_own_beside_the_bar(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    for name, content in jpegs.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    expected = [str(tmp_path / f"{name}.jpg") for name in sorted(jpegs)]
    with running(tiny_catalog, models=("tiny",)) as server:
        server.wait_ready()
        command = [*VITRAIL, "classify", str(tmp_path), "--model", "tiny", "--url", server.url]
        for piped in (False, True):
            ours, theirs = pty.openpty()
            output = subprocess.PIPE if piped else theirs
            terminal = {
                "TERM": "xterm",
                "TERM_PROGRAM": "",
                "NO_COLOR": "",
                "COLORTERM": "truecolor",
            }
            environment = os.environ | terminal
            shown = [] if piped else ["--show"]
            with subprocess.Popen(
                [*command, *shown], stdout=output, stderr=theirs, env=environment
            ) as client:
                os.close(theirs)
                lines = client.stdout.read().decode().splitlines() if client.stdout else []
                seen = read_terminal(ours, "\x1b[?25h")  # the cursor is back
            os.close(ours)
            assert "100%" in seen
            assert ("▀" in seen) == bool(shown)
            if not piped:
                parts = re.split(r"\n|\r|\x1b\[2K", seen)
                lines = [part for part in parts if str(tmp_path) in part]
            assert [line.split(":")[0] for line in lines] == expected


def blocks(text: str) -> Image.Image:
    """The picture that half blocks show: two pixels a character."""
    cell = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀")
    rows = [cell.findall(line) for line in text.splitlines() if "▀" in line]
    drawn = Image.new("RGB", (len(rows[0]), 2 * len(rows)))
    for y, row in enumerate(rows):
        for x, numbers in enumerate(row):
            colours = [int(number) for number in numbers]
            drawn.putpixel((x, 2 * y), tuple(colours[:3]))
            drawn.putpixel((x, 2 * y + 1), tuple(colours[3:]))
    return drawn


def printed(picture: Picture) -> str:
    """What a terminal with colours gets."""
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80, _environ={}
    )
    console.print(picture)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_pictures_are_half_blocks_or_the_terminals_own(
    photos: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "TERM_PROGRAM", "TMUX", "STY"):
        monkeypatch.delenv(name, raising=False)
    coffee = photos["coffee"]  # 600 x 400
    drawn = blocks(printed(Picture(coffee)))
    assert drawn.tobytes() == coffee.resize((48, 32)).tobytes()
    assert blocks(printed(Picture(coffee.resize((50, 400))))).height <= 48  # a tall one
    monkeypatch.setenv("TERM", "xterm-kitty")
    text = printed(Picture(coffee))
    chunks = re.findall(r"\x1b_G(?:a=T,f=100,q=2,c=48,r=16,)?m=([01]);([^\x1b]+)\x1b\\", text)
    assert [more for more, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
    assert max(len(chunk) for _, chunk in chunks) <= 4096
    with Image.open(io.BytesIO(base64.b64decode("".join(chunk for _, chunk in chunks)))) as sent:
        assert sent.size == (768, 512)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    assert "\x1b]1337;File=inline=1;width=48;height=16:iVBOR" in printed(Picture(coffee))
    monkeypatch.setenv("TMUX", "/tmp/tmux")
    assert "▀" in printed(Picture(coffee))


@pytest.mark.parametrize("colours", [True, False])
def test_pictures_are_shown_where_colours_are_wanted(
    monkeypatch: pytest.MonkeyPatch, colours: bool
) -> None:
    written = io.StringIO()
    wanted = {} if colours else {"NO_COLOR": "1"}
    console = Console(
        file=written, force_terminal=True, color_system="truecolor", width=80, _environ=wanted
    )
    monkeypatch.setattr("service.cli.client.errors", console)
    show_picture(Image.new("RGB", (4, 4)))
    assert bool(written.getvalue()) == colours


class Hits:
    """A client whose server finds a photo, and sends no thumbnails with more than 100 hits."""

    def __init__(self, photo: Path, small: str | None) -> None:
        self._hit = {"id": str(photo), "score": 1.0, "thumbnail": small}

    def search(self, collection: str, *, k: int, thumbnails: bool | None, **_: Any) -> list[Any]:
        assert not thumbnails or k <= 100
        return [self._hit]


def test_a_collections_hits_are_shown_by_their_thumbnails_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    """A server's ids may be those of other files here."""
    photo, small = tmp_path / "a.jpg", Image.new("RGB", (3, 2))
    photo.write_bytes(jpegs["coffee"])
    shown: list[Any] = []
    monkeypatch.setattr(retrieval, "show_picture", lambda picture, **_: shown.append(picture))
    search = ["search", "photos", "--text", "a cup", "--show"]

    def run(encoded: str | None, *more: str) -> str:
        hits = nullcontext(Hits(photo, encoded))
        monkeypatch.setattr(retrieval, "connect", lambda *_: hits)
        done = CliRunner().invoke(app, [*search, *more])
        assert done.exit_code == 0, done.output
        return done.output

    run(None)
    assert shown == [None]
    assert "--top" not in run(base64.b64encode(encode(small, "PNG")).decode(), "--top", "100")
    assert shown[1].size == small.size
    assert "--top 100 or less" in run(None, "--top", "101")


def test_the_hits_of_an_index_are_shown_by_their_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpegs["coffee"])
    os.mkfifo(tmp_path / "b.jpg")  # reading it would wait for ever
    found = [{"id": str(tmp_path / name), "score": 1.0} for name in ("a.jpg", "b.jpg", "c.jpg")]
    shown: list[Any] = []
    monkeypatch.setattr(retrieval, "show_picture", lambda picture, **_: shown.append(picture))
    monkeypatch.setattr(retrieval, "_search_file", lambda *_: found)
    done = CliRunner().invoke(app, ["search", "index.npy", "--text", "a cup", "--show"])
    assert done.exit_code == 0, done.output
    assert [picture and picture.size for picture in shown] == [(600, 400), None, None]


def test_an_answers_own_pictures_are_shown_else_the_photo(
    tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpegs["coffee"])
    shown = picture_of(tmp_path / "a.jpg", {"predictions": []})
    assert shown is not None
    assert shown.size == (600, 400)
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    red = Image.new("RGB", (1, 1), "red")
    entry = {name: base64.b64encode(encode(image, "PNG")).decode()
             for name, image in (("depth", deep), ("seen", red))}  # fmt: skip
    both = picture_of(tmp_path / "a.jpg", {"width": 2, "model": "m", **entry})
    assert both is not None
    assert both.tobytes() == bytes([0, 0, 0, 255, 255, 255, 255, 0, 0])
    (tmp_path / "b.jpg").write_bytes(b"no image")
    assert picture_of(tmp_path / "b.jpg", {}) is None


def test_piped_lists_have_a_line_for_each_model() -> None:
    command = [*VITRAIL, "models", "list", "--catalog", "published"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    described = json.loads(subprocess.run([*command, "--json"], capture_output=True).stdout)
    assert [line.split()[0] for line in lines[1:-1]] == [model["name"] for model in described]
    assert all(model["description"][:80] in "".join(lines) for model in described)


def test_files_are_named_after_the_folder_that_was_given(tmp_path: Path) -> None:
    for name in ("a/photos/cat.jpg", "a/photos/cat.png", "a/photos/in/dog.jpg", "b/photos/cat.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    single = tmp_path / "a/photos/cat.jpg"
    assert list(file_names([single]).values()) == ["cat"]
    names = file_names([tmp_path / "a/photos", tmp_path / "b/photos", single])
    assert [(str(path.relative_to(tmp_path)), name) for path, name in names.items()] == [
        ("a/photos/cat.jpg", "photos_cat"),
        ("a/photos/cat.png", "photos_cat-2"),
        ("a/photos/in/dog.jpg", "photos_in_dog"),
        ("b/photos/cat.jpg", "photos_cat-3"),
    ]


@pytest.mark.parametrize(("name", "value"), [("VITRAIL_PRECISION", "x"), ("VITRAIL_PORT", "-1")])
def test_the_doctor_names_wrong_settings_as_they_are_set(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    [finding] = check_settings()
    assert finding.advice == f"unset or correct {name}"


def test_the_doctor_says_what_is_wrong_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = os.environ | {"VITRAIL_PORT": port, "VITRAIL_CATALOG": "nowhere"}
        command = [*VITRAIL, "doctor", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        serve = [*VITRAIL, "serve", "--port", port]
        refused = subprocess.run(serve, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"vitrail: 127.0.0.1:{port}: Address already in use")
    assert done.returncode == 1
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["Python"]["found"].startswith(".".join(map(str, sys.version_info[:2])))
    assert "torch" in findings["packages"]["found"]
    assert findings["REST port"]["state"] == findings["catalog"]["state"] == "bad"
    assert "--port" in findings["REST port"]["advice"]
    assert {"GPU", "memory", "store", "open files", "CPU"} <= findings.keys()


def test_nobody_prints_the_secrets_of_the_catalogs_url(
    tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://user:secret@bucket/catalog.toml"
    with fsspec.open(url, "w") as file:
        file.write("[models]\n")
    monkeypatch.setenv("VITRAIL_CATALOG", url)
    [found] = [each for each in check_settings() if each.subject == "catalog"]
    assert (found.state, found.found) == ("ok", "memory://bucket/catalog.toml: 0 models")
    # with TLS it asks nobody
    settings = Settings().model_copy(update={"tls_cert": "certificate.pem"})
    with summary.console.capture() as printed:
        summary._watch("https://host", settings, None)
    assert "memory://bucket" in printed.get()
    assert "secret" not in printed.get()
