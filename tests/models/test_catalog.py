import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest

from models import catalog_content
from models.catalog import Catalog, load_catalog
from models.catalog_changes import Edition, changes
from models.catalog_content import read_files, without_secrets
from models.checkpoints.sources import parse_source
from models.errors import CatalogError, ModelNotFoundError, SourceError

GOOD = """
[trunks.t]
source = "file:t.safetensors"
[models.a]
trunk = "t"
task = "classify"
[models.b]
trunk = "t"
task = "embed"
[models.c]
trunk = "t"
task = "embed"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "catalog.toml"
    path.write_text(text)
    return path


def test_first_model_of_a_task_is_its_default_and_all_start(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, GOOD))
    assert catalog.default_model("embed").name == "b"
    assert catalog.startup == ("a", "b", "c")
    chosen = load_catalog(write(tmp_path, 'startup = ["c"]\n[defaults]\nembed = "c"\n' + GOOD))
    assert chosen.default_model("embed").name == "c"
    assert chosen.startup == ("c",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "catalog"),
        ("[moduls.a]\n", "moduls"),
        (GOOD + "licens = 'MIT'\n", "licens"),
        (GOOD.replace('task = "classify"', ""), "task is missing"),
        (GOOD.replace('"classify"', '"clasify"'), "clasify"),
        (GOOD.replace('trunk = "t"', 'trunk = "u"', 1), "no trunk 'u'"),
        ('startup = ["z"]\n' + GOOD, "no model z"),
        ('[trunks.t]\nsource = "file:t"\ntolerance = 0\n', "t: tolerance must be a number above 0"),
        (
            '[trunks.t]\nsource = "file:t"\ntolerance = "1"\n',
            "t.tolerance: input should be a valid number",
        ),
        ('[trunks.t]\nsource = "file:t"\nmax_batch_size = {tpu = 4}\n', "cpu, cuda"),
        ('[trunks.t]\nsource = "file:t"\nmax_batch_size = {cpu = 0}\n', "above 0"),
        ('[trunks.t]\nsource = "file:t"\nprecision = "int8"\ndtype = "float32"\n', "set one"),
        ("trunks = 1\n", "trunks: input should be a valid dictionary"),
        ("models = {a = 1}\n", "models.a: input should be a valid dictionary"),
        ("startup = [[]]\n", "startup.0: input should be a valid string"),
        ("[defaults]\nembed = {}\n" + GOOD, "defaults.embed: input should be a valid string"),
        (GOOD + "labels = [1]\n", "labels"),
        (GOOD + "dimensions = 3\n", "c.dimensions: input should be a valid tuple"),
        ('[trunks.t]\nsource = "file:t"\narguments = 1\n', "t.arguments: input should be"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        load_catalog(write(tmp_path, text))


def test_dtype_is_the_other_name_of_precision(tmp_path: Path) -> None:
    path = write(tmp_path, '[trunks.t]\nsource = "file:t"\ndtype = "bfloat16"\n')
    assert load_catalog(path).trunks["t"].precision == "bfloat16"


def test_batches_may_have_a_limit_by_kind_of_device(tmp_path: Path) -> None:
    for value, caps in (("8", (8, 8)), ("{cpu = 4}", (4, None))):
        path = write(tmp_path, f'[trunks.t]\nsource = "file:t"\nmax_batch_size = {value}\n')
        trunk = load_catalog(path).trunks["t"]
        assert (trunk.batch_cap("cpu"), trunk.batch_cap("cuda")) == caps


def test_unknown_catalogs_and_models_are_told_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="demo, hub"):
        load_catalog("nothing")
    with pytest.raises(ModelNotFoundError, match="it has a, b, c"):
        load_catalog(write(tmp_path, GOOD)).model("z")
    with pytest.raises(ModelNotFoundError, match="segment"):
        load_catalog(write(tmp_path, GOOD)).default_model("segment")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://x/y", "must begin with"),
        ("weights.pth", "must begin with"),
        ("https://host/file.pth", "sha256"),
        ("pypi:name==1.0#sha256=00", "member"),
        ("pypi:name#sha256=00&member=x", "=="),
    ],
)
def test_sources_without_their_pins_are_refused(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_source(source)


ABSOLUTE = GOOD.replace("file:t", "file:/weights/t")


@contextmanager
def web_server(content: bytes) -> Iterator[str]:
    """Answers `/catalog.toml`, and 404 to everything else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/catalog.toml"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            self.wfile.write(content if found else b"")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_folder_is_all_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(GOOD)
    (tmp_path / "two.toml").write_text(
        'startup = ["d"]\n[models.d]\ntrunk = "t"\ntask = "embed"\n'
        '[models.e]\ntrunk = "t"\ntask = "embed"\n[defaults]\nembed = "d"\n'
    )
    (tmp_path / "notes.txt").write_text("not a catalog")
    catalog = load_catalog(tmp_path)
    assert set(catalog.models) == {"a", "b", "c", "d", "e"}
    assert catalog.startup == ("a", "b", "c", "d")
    assert catalog.default_model("embed").name == "d"
    assert catalog.path.parent == tmp_path
    (tmp_path / "three.toml").write_text('[models.a]\ntrunk = "t"\ntask = "embed"\n')
    with pytest.raises(CatalogError, match=r"three\.toml: models: another file has a, too"):
        load_catalog(tmp_path)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match=r"no \*\.toml"):
        load_catalog(empty)
    (empty / "lost.toml").symlink_to(empty / "nowhere")
    with pytest.raises(CatalogError, match=r"lost\.toml: No such file"):
        load_catalog(empty)


def test_a_file_that_is_removed_while_its_folder_is_read_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(GOOD)
    (removed := tmp_path / "two.toml").write_text(GOOD)
    files = read_files(tmp_path)
    assert next(files) == (str(tmp_path / "one.toml"), GOOD.encode())
    removed.unlink()
    assert list(files) == []


def test_a_catalog_comes_from_a_url_or_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = load_catalog(write(tmp_path, ABSOLUTE))
    with web_server(ABSOLUTE.encode()) as url:
        remote = load_catalog(f"{url}/catalog.toml")
        assert (remote.trunks, remote.models) == (local.trunks, local.models)
        with pytest.raises(CatalogError, match="/none: the server answered 404"):
            load_catalog(f"{url}/none")
        with pytest.raises(CatalogError) as error:
            load_catalog(f"{url.replace('//', '//user:secret@')}/none?key=secret")
        assert "secret" not in str(error.value)
        monkeypatch.setattr(catalog_content, "MAX_BYTES", 10)
        with pytest.raises(CatalogError, match="more than 10 bytes"):
            load_catalog(f"{url}/catalog.toml")
        monkeypatch.undo()
    with pytest.raises(CatalogError, match="refused"):
        load_catalog(f"{url}/catalog.toml")
    with fsspec.open("memory://bucket/catalog.toml", "wb") as file:
        file.write(ABSOLUTE.encode())
    assert load_catalog("memory://bucket/catalog.toml").models == local.models
    with fsspec.open("memory://bucket/relative.toml", "wb") as file:
        file.write(GOOD.encode())
    with pytest.raises(CatalogError, match=r"t: t.safetensors is relative; a catalog from a URL"):
        load_catalog("memory://bucket/relative.toml")
    for missing in ("memory://bucket/none.toml", "no-such-store://bucket/catalog.toml"):
        with pytest.raises(CatalogError, match=r"none\.toml|no-such-store"):
            load_catalog(missing)


def test_a_download_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only each of its reads."""
    times = iter((0.0, catalog_content.TIMEOUT_S + 1))
    monkeypatch.setattr(catalog_content, "monotonic", lambda: next(times))
    with (
        web_server(ABSOLUTE.encode()) as url,
        pytest.raises(CatalogError, match="it took more than 30 s"),
    ):
        load_catalog(f"{url}/catalog.toml")


@pytest.mark.parametrize(
    ("url", "to", "is_refused"),
    [
        ("https://safe/c.toml", "https://other/c.toml", False),
        ("https://safe/c.toml", "http://plain/c.toml", True),
        ("http://plain/c.toml", "https://safe/c.toml", False),
    ],
)
def test_a_redirect_stays_encrypted(
    monkeypatch: pytest.MonkeyPatch, url: str, to: str, is_refused: bool
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url == url:
            return httpx.Response(302, headers={"Location": to})
        return httpx.Response(200, text=ABSOLUTE)

    class Client(httpx.Client):
        def __init__(self, **options: Any) -> None:
            super().__init__(transport=httpx.MockTransport(answer), **options)

    monkeypatch.setattr(httpx, "Client", Client)
    if is_refused:
        with pytest.raises(CatalogError, match="it redirects from https to http"):
            load_catalog(url)
    else:
        assert set(load_catalog(url).models) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a/c.toml", "https://host/a/c.toml"),
        ("https://user:secret@host:80/c.toml?key=secret#secret", "https://host:80/c.toml"),
        ("simplecache::s3://user:secret@b/c", "simplecache::s3://b/c"),
        ("zip://c.toml::s3://user:secret@b/c", "...://b/c"),
        ("http://user:secret/secret@host/c", "http://host/c"),
        ("http://user:secret@secret@host/c", "http://host/c"),
        ("http://user:secret?secret@host/c", "http://..."),
        ("https://host/c?key=secret&next=https://secret@other", "https://..."),
        ("https://host/c?key=secret&next=https://secret", "https://host/c"),
    ],
)
def test_messages_have_no_secrets_of_a_url(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert without_secrets("a?b@c.toml") == "a?b@c.toml"


@pytest.mark.parametrize("url", ["http://user:se/cret@host/c", "http://user:secret@..host/c"])
def test_an_invalid_url_is_not_repeated(url: str) -> None:
    with pytest.raises(CatalogError, match=r"the URL is invalid$") as error:
        load_catalog(url)
    assert "se" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot open {url}: no such bucket", "cannot open s3://bucket/c: no such bucket"),
        ("no bucket", "no bucket"),
        ("no user secret/word", "OSError"),
        ("signed with {url}&token=hidden", "OSError"),
        ("", "OSError"),
    ],
)
def test_what_a_store_says_is_told_without_secrets(
    monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    url = "s3://owner:secret%2Fword@bucket/c?token=hidden"

    def fail(url: str) -> None:
        raise OSError(text.replace("{url}", url, 1).replace("signed", "token=hidden signed"))

    monkeypatch.setattr(fsspec, "url_to_fs", fail)
    with pytest.raises(CatalogError) as error:
        load_catalog(url)
    assert str(error.value) == f"catalog s3://bucket/c: {told}"
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000, "a = \xff"])
def test_what_is_beyond_toml_is_an_error_of_the_catalog(tmp_path: Path, text: str) -> None:
    (tmp_path / "catalog.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(CatalogError, match=r"catalog\.toml: "):
        load_catalog(tmp_path / "catalog.toml")


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, GOOD.replace("file:t", "file:a\\u0000b")))
    assert Edition.of(catalog).trunks["t"][1] == ((0, 0),)


def test_what_shares_a_trunk_changes_together(tmp_path: Path) -> None:
    more = '[trunks.u]\nsource = "file:u.pth"\n[models.d]\ntrunk = "u"\ntask = "embed"\n'
    path = write(tmp_path, GOOD + more)
    for name in ("t.safetensors", "u.pth"):
        (tmp_path / name).write_text("1")
    catalog = load_catalog(path)
    first = Edition.of(catalog)
    assert changes(first, Edition.of(catalog)) == []
    assert [len(change.models) for change in changes(Edition(), first)] == [3, 1]

    (tmp_path / "t.safetensors").write_text("22")
    [change] = changes(first, Edition.of(catalog))
    assert (set(change.trunks), set(change.models)) == ({"t"}, {"a", "b", "c"})

    changed = with_model(catalog, "d", description="other")
    [_, change] = changes(first, Edition.of(changed))
    assert (set(change.trunks), set(change.models)) == (set(), {"d"})

    # a model that moves to another trunk goes with the one that it leaves
    moved = with_model(catalog, "d", trunk="t")
    [change] = changes(first, Edition.of(moved))
    assert (set(change.trunks), set(change.models)) == ({"t"}, {"a", "b", "c", "d"})


def with_model(catalog: Catalog, name: str, **changed: str) -> Catalog:
    models = {**catalog.models, name: replace(catalog.models[name], **changed)}  # type: ignore[arg-type]
    return replace(catalog, models=models)
