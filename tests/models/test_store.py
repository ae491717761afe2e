import os
import shutil
import ssl
import subprocess
import threading
import time
import zipfile
from functools import partial
from hashlib import sha256
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from models.checkpoints.sources import fetch, parse_source
from models.checkpoints.store import Store
from models.errors import SourceError


def test_a_file_is_made_once_however_many_want_it(tmp_path: Path) -> None:
    store, made = Store(tmp_path), []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)
        path.write_text("content")

    threads = [
        threading.Thread(target=lambda: Store(tmp_path).get("key", ".txt", make)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert store.get("key", ".txt", make).read_text() == "content"


def test_an_interrupted_making_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get("key", ".txt", fail)
    assert not Store(tmp_path).path("key", ".txt").exists()
    assert not list(tmp_path.glob("tmp-*"))
    assert Store(tmp_path).get("key", ".txt", lambda p: Path.touch(p)).exists()


def test_a_file_that_rots_on_disk_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made: list[int] = []

    def make(path: Path) -> None:
        made.append(1)
        path.write_bytes(b"weights")

    path = store.get("key", ".bin", make)
    assert store.get("key", ".bin", make) == path
    stamp = path.stat()
    path.write_bytes(b"weighty")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert store.get("key", ".bin", make).read_bytes() == b"weights"
    assert len(made) == 2
    path.with_name(path.name + ".sha256").unlink()  # as earlier versions left it
    assert store.get("key", ".bin", make) == path
    assert len(made) == 2
    path.write_bytes(b"weighty")
    assert store.get("key", ".bin", make).read_bytes() == b"weights"
    assert len(made) == 3


def test_file_sources_are_relative_to_the_catalog(tmp_path: Path) -> None:
    source = parse_source("file:weights/a.safetensors")
    assert fetch(source, Store(tmp_path), Path("/catalogs")) == Path(
        "/catalogs/weights/a.safetensors"
    )


@pytest.fixture
def https_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A folder served over TLS on loopback, with a certificate the client trusts; and its URL."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the test's certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return folder, f"https://localhost:{server.server_port}"


def test_https_sources_are_downloaded_once_and_checked(
    tmp_path: Path, https_folder: tuple[Path, str]
) -> None:
    folder, url = https_folder
    (folder / "a.bin").write_bytes(b"weights")
    pin = sha256(b"weights").hexdigest()
    store = Store(tmp_path / "store")
    path = fetch(parse_source(f"{url}/a.bin#sha256={pin}"), store, tmp_path)
    assert path.read_bytes() == b"weights"
    (folder / "a.bin").unlink()
    assert fetch(parse_source(f"{url}/a.bin#sha256={pin}"), store, tmp_path) == path


def test_what_is_not_what_was_pinned_never_enters_the_store(
    tmp_path: Path, https_folder: tuple[Path, str]
) -> None:
    folder, url = https_folder
    (folder / "a.bin").write_bytes(b"changed")
    source = parse_source(f"{url}/a.bin#sha256={sha256(b'weights').hexdigest()}")
    store = Store(tmp_path / "store")
    with pytest.raises(SourceError, match="is pinned"):
        fetch(source, store, tmp_path)
    assert not store.path(source.text, ".bin").exists()
    with pytest.raises(SourceError, match="404"):
        fetch(parse_source(f"{url}/b.bin#sha256=00"), store, tmp_path)


def test_a_wheel_is_fetched_once_for_all_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in ("a.bin", "b.bin"):
            archive.writestr(member, member)
        archive.writestr("weights-1.0.dist-info/METADATA", "Name: weights\nVersion: 1.0\n")
        archive.writestr("weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    pinned = f"pypi:weights==1.0#sha256={sha256(wheel.read_bytes()).hexdigest()}&member="
    store = Store(tmp_path / "store")
    assert fetch(parse_source(f"{pinned}a.bin"), store, tmp_path).read_text() == "a.bin"
    wheel.unlink()
    assert fetch(parse_source(f"{pinned}b.bin"), store, tmp_path).read_text() == "b.bin"
    with pytest.raises(SourceError, match="no member"):
        fetch(parse_source(f"{pinned}c.bin"), store, tmp_path)
