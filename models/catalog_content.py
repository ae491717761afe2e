"""What catalogs are read from: a file, a folder of files, a URL, or an object store."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, TypedDict, get_type_hints
from urllib.parse import unquote

import httpx
from pydantic import TypeAdapter, ValidationError

from models.errors import CatalogError

# Most bytes of a catalog. 100,000 models have 15 MB.
MAX_BYTES = 64 * 2**20
TIMEOUT_S = 30.0
# Names of protocols, such as `https` and `simplecache::s3`.
SCHEMES = re.compile(r"[\w+.-]+(::[\w+.-]+)*")


def is_url(location: str | Path) -> bool:
    """Whether a catalog is at a URL, of a web server or of an object store."""
    return "://" in str(location)


def without_secrets(location: str | Path) -> str:
    """A location for messages: a URL without its user, its password and its query, nor anything
    else that can be a part of them if a password is not quoted."""
    if not is_url(location):
        return str(location)
    shown, *query = re.split("[?#]", str(location), maxsplit=1)
    scheme, _, rest = shown.rpartition("://")
    scheme = scheme if SCHEMES.fullmatch(scheme) else "..."
    ambiguous = "@" in "".join(query)
    return f"{scheme}://{'...' if ambiguous else rest.rpartition('@')[2]}"


class _Content(TypedDict, total=False):
    trunks: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    defaults: dict[str, str]
    startup: list[str]


def read_content(location: str | Path) -> dict[str, Any]:
    """The tables of a catalog: of one file, or of a folder's `*.toml` together.

    Raises:
        CatalogError: it cannot be read, is too large or not TOML, or has a table that is unknown,
            of another type, or in two files.
    """
    contents: dict[str, dict[str, Any]] = {}
    for name, file in read_files(location):
        try:
            contents[name] = tomllib.loads(file.decode())
        except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or beyond limits
            raise CatalogError(f"catalog {name}: {error}") from error
        _check_tables(name, contents[name])
    is_folder = not is_url(location) and Path(location).is_dir()
    return _merge(contents) if is_folder else contents.popitem()[1]


def check_type(where: str, name: str, hint: Any, value: Any) -> None:
    """
    Raises:
        CatalogError: the value is not of that type.
    """
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, (name, *first["loc"])))
        raise CatalogError(f"catalog {where}: {place}: {first['msg'].lower()}") from error


def _check_tables(where: str, content: dict[str, Any]) -> None:
    """
    Raises:
        CatalogError: a table is unknown, or of another type.
    """
    if unknown := content.keys() - {"trunks", "models", "defaults", "startup"}:
        raise CatalogError(
            f"catalog {where}: unknown table {', '.join(sorted(unknown))}; known are "
            "trunks, models, defaults, startup"
        )
    for key, value in content.items():
        check_type(where, key, get_type_hints(_Content)[key], value)


def _merge(contents: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of a folder's files together. A file without `startup` starts all its models.

    Raises:
        CatalogError: an entry is in two files.
    """
    merged: dict[str, Any] = {"trunks": {}, "models": {}, "defaults": {}, "startup": []}
    for name, content in contents.items():
        for table in ("trunks", "models", "defaults"):
            if twice := merged[table].keys() & content.get(table, {}).keys():
                raise CatalogError(
                    f"catalog {name}: {table}: another file has {', '.join(sorted(twice))}, too"
                )
            merged[table] |= content.get(table, {})
        merged["startup"] += content.get("startup", content.get("models", {}))
    return merged


def read_files(location: str | Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a catalog's files: one, or those of a folder, `*.toml`.

    Raises:
        CatalogError: it cannot be read, is too large, or the folder has no such file.
    """
    if is_url(location):
        yield without_secrets(location), _read_url(str(location))
        return
    path = Path(location)
    if not path.is_dir():
        yield str(path), _read_file(path)
        return
    is_empty = True
    for file in sorted(path.glob("*.toml")):
        try:
            content = _read_file(file)
        except CatalogError:
            if not os.path.lexists(file):  # removed since the folder was listed
                continue
            raise
        is_empty = False
        yield str(file), content
    if is_empty:
        raise CatalogError(f"catalog {path}: the folder has no *.toml")


def _read_file(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise CatalogError(f"catalog {file}: it has more than {MAX_BYTES} bytes")
        return file.read_bytes()
    except OSError as error:
        raise CatalogError(f"catalog {file}: {error.strerror}") from error


def _read_url(url: str) -> bytes:
    is_web = url.lower().startswith(("http://", "https://"))
    content = _download(url) if is_web else _open_store(url)
    if len(content) > MAX_BYTES:
        raise CatalogError(f"catalog {without_secrets(url)}: it has more than {MAX_BYTES} bytes")
    return content


def _download(url: str) -> bytes:
    where, end = f"catalog {without_secrets(url)}", monotonic() + TIMEOUT_S
    content = bytearray()

    def check_redirect(request: httpx.Request) -> None:
        if url.lower().startswith("https:") and request.url.scheme != "https":
            raise CatalogError(f"{where}: it redirects from https to {request.url.scheme}")

    hooks = {"request": [check_redirect]}
    try:
        with (
            httpx.Client(follow_redirects=True, timeout=TIMEOUT_S, event_hooks=hooks) as client,
            client.stream("GET", url) as response,
        ):
            if not response.is_success:
                raise CatalogError(f"{where}: the server answered {response.status_code}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    break
                if monotonic() > end:  # each read has the whole timeout
                    raise CatalogError(f"{where}: it took more than {TIMEOUT_S:.0f} s")
    except (httpx.InvalidURL, UnicodeError):  # the text can have a part of a password
        raise CatalogError(f"{where}: the URL is invalid") from None
    except httpx.HTTPError as error:
        raise CatalogError(f"{where}: {str(error) or type(error).__name__}") from error
    return bytes(content)


def _open_store(url: str) -> bytes:
    """The content of a file in an object store, by the package that fsspec has for its scheme."""
    import fsspec

    try:
        store, path = fsspec.url_to_fs(url)
        store.invalidate_cache()
        with store.open(path, "rb") as file:
            content: bytes = file.read(MAX_BYTES + 1)
            return content
    except Exception as error:  # each store has errors of its own
        # not from it: what is logged of it could have the URL's secrets
        raise CatalogError(f"catalog {without_secrets(url)}: {_reason(url, error)}") from None


def _reason(url: str, error: Exception) -> str:
    """An error's text, or only its type if the text has a secret of the URL."""
    text = str(error).replace(url, without_secrets(url))
    user = url.partition("://")[2].rpartition("@")[0]
    secrets = {*re.split("[:/]", user), *re.split("[:/]", unquote(user))}
    secrets |= {*re.split("[?#]", url, maxsplit=1)[1:]}
    told = any(secret in text for secret in secrets - {""})
    return type(error).__name__ if told or not text else text
