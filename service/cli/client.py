"""A client for files and folders: one request for each file, several at a time."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import httpx
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import vitrail_client
from models.inputs.images import SUFFIXES
from service.cli.pictures import Picture, picture_of
from service.cli.tables import write_table
from vitrail_client.protocol import DEFAULT_URL


def _check_url(url: str) -> str:
    """Refuse what httpx could not send to."""
    try:
        known = httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        known = False
    if not known:
        raise typer.BadParameter(f"{url!r} is not a URL such as {DEFAULT_URL}")
    return url


Paths = Annotated[list[Path], typer.Argument(exists=True, help="Images, or folders of images.")]
Url = Annotated[
    str,
    typer.Option(
        envvar="VITRAIL_URL",
        help="URL of the server; by default port 8000 of this machine.",
        show_default=False,  # it is cut off in narrow terminals
        callback=_check_url,
    ),
]
Key = Annotated[
    str | None, typer.Option(envvar="VITRAIL_API_KEY", help="API key, if the server requires one.")
]
Model = Annotated[str | None, typer.Option(help="A model of the server's catalog.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
Show = Annotated[
    bool, typer.Option("--show", help="Show pictures in the terminal, if it has colours.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.")]

DEFAULT_CONCURRENCY = 8
TIMEOUT_S = 120

errors = Console(stderr=True, soft_wrap=True)  # no line breaks, so that messages can be searched

# One entry of `results` with the model that returned it, or `{"error": text}`.
Entry = dict[str, Any]


class Client:
    """Sends one image per request, several requests at a time, and keeps the order of the paths.

    Args:
        task: the task's route.
        parameters: the route's parameters; those that are None are not sent.
        concurrency: requests at a time.

    Raises:
        typer.Exit: there is no server.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        task: str,
        parameters: Mapping[str, Any],
        concurrency: int = DEFAULT_CONCURRENCY,
    ) -> None:
        check_server(url)
        self._http = vitrail_client.Client(url, key=key, timeout_s=TIMEOUT_S)
        self._query = {name: value for name, value in parameters.items() if value is not None}
        self._task = task
        self._concurrency = concurrency

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def run(
        self,
        paths: list[Path],
        as_json: bool,
        output: Path | None,
        line: Callable[[Entry], str],
        *,
        show: bool = False,
    ) -> None:
        """Print an entry for each image, or write them all to a table.

        Args:
            output: the table; None to print.
            line: an entry as a line of text, for `as_json` False.
            show: print a picture of each entry, too.

        Raises:
            typer.Exit: there was no image, or a request failed.
        """
        files = list(expand(paths))
        if not files:
            errors.print("no image among the given paths")
            raise typer.Exit(1)
        rows: list[Entry] = []
        failed = 0
        show_bar = len(files) > 1 and errors.is_terminal
        above_bar = show_bar and sys.stdout.isatty()

        def echo(text: str) -> None:
            if above_bar:
                errors.print(text, markup=False, highlight=False)
            else:
                typer.echo(text)

        with Progress(console=errors, disable=not show_bar) as progress:
            bar = progress.add_task(self._task, total=len(files))
            for path, entry in self.ask_all(files):
                progress.advance(bar)
                if "error" in entry:
                    failed += 1
                    errors.print(f"{path}: {entry['error']}", markup=False, highlight=False)
                elif output is not None:
                    rows.append({"path": str(path), **entry})
                if as_json:
                    echo(json.dumps({"path": str(path), **entry}))
                elif output is None and "error" not in entry:
                    echo(f"{path}: {line(entry)}")
                if show and "error" not in entry:
                    show_picture(picture_of(path, entry))
        if output is not None:
            write_table(rows, output)
            errors.print(f"{len(rows)} rows in {output}", highlight=False)
        if failed:
            raise typer.Exit(1)

    def ask_all(self, files: list[Path]) -> Iterator[tuple[Path, Entry]]:
        """Every file with its entry, in order.

        Unlike `Executor.map`, it reads only as many files ahead as keep the threads busy.
        """
        pending: deque[tuple[Path, Future[Entry]]] = deque()
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for path in files:
                    pending.append((path, pool.submit(self.ask, path)))
                    if len(pending) > 2 * self._concurrency:
                        first, entry = pending.popleft()
                        yield first, entry.result()
                while pending:
                    first, entry = pending.popleft()
                    yield first, entry.result()
            finally:
                for _, entry in pending:
                    entry.cancel()

    def ask(self, path: Path) -> Entry:
        """The entry of an image file."""
        try:
            return self.post_image(path.read_bytes())
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def ask_text(self, text: str) -> Entry:
        """The entry of a text."""
        return self._post(params=self._query, json={"texts": [text]})

    def post_image(self, content: bytes, **parameters: Any) -> Entry:
        """The entry of an encoded image, with further parameters of the route."""
        headers = {"Content-Type": "application/octet-stream"}
        return self._post(params={**self._query, **parameters}, content=content, headers=headers)

    def _post(self, **arguments: Any) -> Entry:
        try:
            body = self._http.request("POST", f"/{self._task}", **arguments)
        except vitrail_client.VitrailError as error:
            return {"error": f"{error.status} {error.problem.get('detail', '')}"}
        except (httpx.HTTPError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        shared = {k: body[k] for k in ("model", "model_digest", "preprocess_digest") if k in body}
        return {**body["results"][0], **shared}


def show_picture(picture: Image.Image | None, **options: Any) -> None:
    """Print a picture above the progress bar, if there is one, and the terminal has colours.

    Args:
        options: of `Picture`.
    """
    if picture is not None and errors.color_system is not None and not errors.no_color:
        errors.print(Picture(picture, **options))


def check_server(url: str) -> None:
    """End the command at once if there is no server. Later, requests wait for one that restarts."""
    try:
        httpx.get(f"{url.rstrip('/')}/healthz", timeout=TIMEOUT_S)
    except httpx.TransportError as error:
        text = f"no server at {url} ({error}); `vitrail serve` starts one"
        errors.print(text, markup=False, highlight=False)
        raise typer.Exit(1) from error


@contextmanager
def connect(
    url: str, key: str | None, *, advice: str = "", **options: Any
) -> Iterator[vitrail_client.Client]:
    """A client whose errors are printed, and end the command.

    Args:
        advice: what to do when the server gives no answer.
        options: further arguments of `vitrail_client.Client`.
    """
    check_server(url)
    try:
        with vitrail_client.Client(url, key=key, timeout_s=TIMEOUT_S, **options) as client:
            yield client
    except vitrail_client.VitrailError as error:
        text = f"{error.status} {error.problem.get('detail', '')}"
    except httpx.TransportError as error:
        text = f"the server at {url} gave no answer ({error}){advice}"
    except (httpx.HTTPError, OSError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
    else:
        return
    errors.print(text, markup=False, highlight=False)
    raise typer.Exit(1)


def expand(paths: list[Path]) -> Iterator[Path]:
    """Files as they are; folders as the images below them, sorted."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            yield path
