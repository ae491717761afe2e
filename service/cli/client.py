"""`vitrail classify|zero-shot|segment PATH...`: ask a running server about files and folders."""

import base64
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import Progress

from models.inputs.images import SUFFIXES
from service.cli.tables import write_table

RETRY_STATUSES = (429, 503)
MAX_TRIES = 5

Paths = Annotated[list[Path], typer.Argument(exists=True, help="Images, or folders of images.")]
Url = Annotated[str, typer.Option(envvar="VITRAIL_URL", help="The server.")]
Key = Annotated[
    str | None, typer.Option(envvar="VITRAIL_API_KEY", help="API key, if it wants one.")
]
Model = Annotated[str | None, typer.Option(help="A model of the server's catalog.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Output = Annotated[Path | None, typer.Option(help="Write a .parquet file.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.")]

DEFAULT_URL = "http://127.0.0.1:8000"

errors = Console(stderr=True, soft_wrap=True)  # lines stay whole where they are searched


def classify(
    paths: Paths,
    url: Url = DEFAULT_URL,
    key: Key = None,
    model: Model = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes an image (5).")] = None,
    as_json: Json = False,
    output: Output = None,
    concurrency: Concurrency = 8,
) -> None:
    """Name what images show."""
    ask = Client(url, key, "classify", {"model": model, "top_k": top_k}, concurrency)
    ask.run(paths, as_json, output, _predictions)


def zero_shot(
    paths: Paths,
    labels: Annotated[list[str], typer.Option(help="What it may be; once for each.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    model: Model = None,
    templates: Annotated[list[str] | None, typer.Option(help="Sentences with {}.")] = None,
    as_json: Json = False,
    output: Output = None,
    concurrency: Concurrency = 8,
) -> None:
    """Score images by labels of your own."""
    parameters = {"model": model, "labels": labels, "templates": templates}
    client = Client(url, key, "zero-shot", parameters, concurrency)
    client.run(paths, as_json, output, _predictions)


def segment(
    paths: Paths,
    url: Url = DEFAULT_URL,
    key: Key = None,
    model: Model = None,
    labels: Annotated[
        list[str] | None, typer.Option(help="What to look for, once for each; of prompted models.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    min_area: Annotated[
        int | None, typer.Option(min=0, help="Leave out smaller regions, in pixels.")
    ] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option(help="A .parquet file, or a folder for the masks as PNG.")
    ] = None,
    overlays: Annotated[
        bool, typer.Option("--overlays", help="Beside each mask, a picture of it on the image.")
    ] = False,
    concurrency: Concurrency = 8,
) -> None:
    """Mask what images show; a folder's masks are written as they get done."""
    parameters = {"model": model, "labels": labels, "threshold": threshold, "min_area": min_area}
    into_folder = output is not None and not output.suffix
    if overlays and not into_folder:
        raise typer.BadParameter("--overlays needs a folder as --output")
    ask = SegmentClient(url, key, "segment", parameters, concurrency)
    ask.overlays = overlays
    if into_folder and output is not None:
        output.mkdir(parents=True, exist_ok=True)
        ask.folder = output

    def line(answer: dict[str, Any]) -> str:
        total = answer["width"] * answer["height"]
        shares = [f"{c['label']} {c['pixels'] / total:.1%}" for c in answer["classes"]]
        return f"{answer['width']}x{answer['height']}: {', '.join(shares)}"

    ask.run(paths, as_json, None if into_folder else output, line)


def _predictions(answer: dict[str, Any]) -> str:
    return ", ".join(f"{p['label']} {p['score']:.3f}" for p in answer["predictions"])


class Client:
    """Asks about one image a request, several at a time, and keeps the order of the paths."""

    def __init__(
        self, url: str, key: str | None, task: str, parameters: dict[str, Any], concurrency: int
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers["Content-Type"] = "application/octet-stream"
        given = {name: value for name, value in parameters.items() if value is not None}
        self._http = httpx.Client(base_url=url, headers=headers, params=given, timeout=120)
        self._task = task
        self._concurrency = concurrency

    def run(
        self,
        paths: list[Path],
        as_json: bool,
        output: Path | None,
        line: Callable[[dict[str, Any]], str],
    ) -> None:
        files = list(expand(paths))
        if not files:
            errors.print("no image among the paths given")
            raise typer.Exit(1)
        rows: list[dict[str, Any]] = []
        failed = 0
        show_bar = len(files) > 1 and errors.is_terminal
        with (
            ThreadPoolExecutor(self._concurrency) as pool,
            Progress(console=errors, disable=not show_bar) as progress,
        ):
            bar = progress.add_task(self._task, total=len(files))
            for path, answer in self._in_order(pool, files):
                progress.advance(bar)
                if "error" in answer:
                    failed += 1
                    errors.print(f"{path}: {answer['error']}", markup=False, highlight=False)
                elif output is not None:
                    rows.append({"path": str(path), **answer})
                if as_json:
                    typer.echo(json.dumps({"path": str(path), **answer}))
                elif output is None and "error" not in answer:
                    typer.echo(f"{path}: {line(answer)}")
        if output is not None:
            write_table(rows, output)
            errors.print(f"{len(rows)} rows in {output}", highlight=False)
        if failed:
            raise typer.Exit(1)

    def ask_all(self, files: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every file with its answer, in order, several asked about at a time."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            yield from self._in_order(pool, files)

    def ask(self, path: Path) -> dict[str, Any]:
        """The answer's one entry with the model that gave it, or `{"error": why}`."""
        try:
            return self._post(content=path.read_bytes())
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def ask_text(self, text: str) -> dict[str, Any]:
        """The same for a text."""
        return self._post(json={"texts": [text]}, headers={"Content-Type": "application/json"})

    def _in_order(
        self, pool: ThreadPoolExecutor, files: list[Path]
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """As `pool.map`, but no further ahead than what keeps it busy."""
        ahead: deque[tuple[Path, Future[dict[str, Any]]]] = deque()
        try:
            for path in files:
                ahead.append((path, pool.submit(self.ask, path)))
                if len(ahead) > 2 * self._concurrency:
                    first, answer = ahead.popleft()
                    yield first, answer.result()
            while ahead:
                first, answer = ahead.popleft()
                yield first, answer.result()
        finally:
            for _, answer in ahead:
                answer.cancel()

    def _post(self, **request: Any) -> dict[str, Any]:
        try:
            for _ in range(MAX_TRIES):
                response = self._http.post(f"/{self._task}", **request)
                if response.status_code not in RETRY_STATUSES:
                    break
                time.sleep(float(response.headers.get("Retry-After", 1)))
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        if response.status_code != 200:
            return {"error": f"{response.status_code} {body.get('detail', '')}"}
        given = {k: body[k] for k in ("model", "model_digest", "preprocess_digest") if k in body}
        return {**body["results"][0], **given}


class SegmentClient(Client):
    """Writes masks into `folder`, where there is one, each as soon as it is there; with `overlays`
    the picture of it, too, which is a second request."""

    folder: Path | None = None
    overlays = False

    def ask(self, path: Path) -> dict[str, Any]:
        answer = super().ask(path)
        if self.folder is None or "error" in answer:
            return answer
        try:
            name = file_name(path)
            (self.folder / f"{name}.png").write_bytes(base64.b64decode(answer["mask"]))
            if self.overlays:
                picture = self._post(content=path.read_bytes(), params={"output": "overlay"})
                if "error" in picture:
                    return picture
                content = base64.b64decode(picture["mask"])
                (self.folder / f"{name}.overlay.png").write_bytes(content)
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return answer


def file_name(path: Path) -> str:
    """The whole path in the name, so that equal names in two folders do not meet."""
    return path.with_suffix("").as_posix().strip("/").replace("/", "_")


def expand(paths: list[Path]) -> Iterator[Path]:
    """Files as they are; folders as the images below them, sorted."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            yield path
