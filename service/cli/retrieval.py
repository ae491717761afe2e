"""`vitrail embed` writes an index of images; `vitrail search` searches it, or a collection of the
server, by image or text."""

import base64
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.progress import Progress

from models.tasks.base import Task
from service.cli.client import (
    Client,
    Json,
    Key,
    Show,
    Url,
    connect,
    errors,
    expand,
    show_picture,
)
from service.cli.pictures import read_picture
from service.cli.task_commands import Invocation, run_task
from vitrail_client.protocol import DEFAULT_URL, Scalar

MAX_SHOWN = 100  # hits with which servers send thumbnails
HIT_COLUMNS = 24  # of the terminal, for a hit's picture


def run_embed(task: Task, invocation: Invocation) -> None:
    """As `run_task`; with `--output`, embeddings are written in parts, so that a run can resume."""
    if invocation.options["output"] == "tokens" and invocation.output is not None:
        raise typer.BadParameter("--output holds one vector for each image; print tokens as --json")
    if invocation.output is None:
        run_task(task, invocation)
        return
    pooling: str | None = invocation.options["pooling"]
    with invocation.client(task, Client) as client:
        _write_index(client, invocation.paths, invocation.output, pooling)


def search(
    index: Annotated[
        str, typer.Argument(help="A file that `vitrail embed` wrote, or a collection's name.")
    ],
    image: Annotated[Path | None, typer.Option(exists=True, help="Find similar images.")] = None,
    text: Annotated[str | None, typer.Option(help="Find what the text describes.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of results.")] = 5,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only images of the collection whose metadata has this: folder=beach. A value is "
            "a number, true, false or null if it reads as one and is not quoted; a folder is text.",
            metavar="FIELD=VALUE",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
    show: Show = False,
) -> None:
    """Search an index or a collection for the nearest images, by cosine similarity."""
    if (image is None) == (text is None):
        raise typer.BadParameter("search by --image, or by --text")
    is_file = bool(Path(index).suffix)  # collections' names have no dot
    if is_file:
        if where:
            raise typer.BadParameter("--where is for collections; a file has no metadata")
        found = _search_file(Path(index), image, text, top, url, key)
    else:
        with connect(url, key) as client:
            conditions = dict(map(_condition, where or []))
            thumbnails = (show and top <= MAX_SHOWN) or None
            found = client.search(
                index, image=image, text=text, k=top, where=conditions, thumbnails=thumbnails
            )
        if show and not thumbnails:
            errors.print(f"pictures are shown with --top {MAX_SHOWN} or less", highlight=False)
    for hit in found:
        path, score = hit["id"], hit["score"]
        line = json.dumps({"path": path, "score": score}) if as_json else f"{score:.3f}  {path}"
        typer.echo(line)
        if show:
            picture = _file_picture(Path(path)) if is_file else _thumbnail(hit)
            show_picture(picture, columns=HIT_COLUMNS)


def _thumbnail(hit: dict[str, Any]) -> Image.Image | None:
    """The thumbnail of a collection's hit. Its id is no path here, whatever it looks like."""
    encoded = hit.get("thumbnail")
    return read_picture(base64.b64decode(encoded)) if encoded else None


def _file_picture(path: Path) -> Image.Image | None:
    """The picture of an index file's hit; None if it is not here any more."""
    try:
        return read_picture(path.read_bytes()) if path.is_file() else None
    except OSError:
        return None


def _condition(text: str) -> tuple[str, Scalar]:
    """`year=2024` as a field and its value: a finite number, true, false, null, or else a text.
    So are a value in JSON's quotes, and a folder, whatever its name."""
    field, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint="--where")
    try:
        known: Any = json.loads(value)
    except (ValueError, RecursionError):
        return field, value
    if isinstance(known, str):
        return field, known
    scalar = known is None or (isinstance(known, int | float) and abs(known) < math.inf)  # not NaN
    return field, known if scalar and field != "folder" else value


def _search_file(
    index: Path, image: Path | None, text: str | None, top: int, url: str, key: str | None
) -> list[dict[str, Any]]:
    """Exact search of a file's vectors; hits as a collection's have them, with paths for ids."""
    import numpy as np
    from usearch.index import MetricKind
    from usearch.index import search as nearest

    from service.cli.index import IndexFileError, read_index

    try:
        contents = read_index(index)
    except IndexFileError as error:
        errors.print(str(error), highlight=False)
        raise typer.Exit(1) from error
    parameters = {"model": contents.made_by.model, "pooling": contents.made_by.pooling}
    with Client(url, key, "embed", parameters) as client:
        entry = client.ask(image) if image is not None else client.ask_text(str(text))
    if "error" in entry:
        errors.print(str(entry["error"]), markup=False, highlight=False)
        raise typer.Exit(1)
    if entry["model_digest"] != contents.made_by.model_digest:
        errors.print(
            f"{index} was made with another version of {contents.made_by.model}; "
            "embed the folder again"
        )
        raise typer.Exit(1)
    query = np.array(entry["embedding"], np.float32)[: contents.vectors.shape[1]]
    count = min(top, len(contents.paths))
    matches = nearest(np.asarray(contents.vectors), query, count, MetricKind.Cos, exact=True)
    found = zip(matches.keys.tolist(), matches.distances.tolist(), strict=True)
    return [{"id": contents.paths[position], "score": 1 - distance} for position, distance in found]


def _write_index(client: Client, paths: list[Path], output: Path, pooling: str | None) -> None:
    from service.cli.index import IndexFileError, IndexWriter, MadeBy

    try:
        writer = IndexWriter(output)
        done = writer.done()
        files = [path for path in expand(paths) if str(path) not in done]
        if not files and not done:
            errors.print("no image among the given paths")
            raise typer.Exit(1)
        if done:
            errors.print(f"{len(done)} images are done already", highlight=False)
        failed = 0
        with Progress(console=errors, disable=not errors.is_terminal) as progress:
            bar = progress.add_task("embed", total=len(files) + len(done), completed=len(done))
            try:
                for path, entry in client.ask_all(files):
                    if "error" in entry:
                        errors.print(f"{path}: {entry['error']}", markup=False, highlight=False)
                        failed += 1
                    else:
                        names = ("model", "model_digest", "preprocess_digest")
                        writer.check(MadeBy(**{n: entry[n] for n in names}, pooling=pooling))
                        writer.add(str(path), entry["embedding"])
                    progress.advance(bar)
            except BaseException:
                writer.flush()  # the next run continues from here
                raise
        rows = writer.finish()
    except IndexFileError as error:
        errors.print(str(error), highlight=False)
        raise typer.Exit(1) from error
    errors.print(f"{rows} vectors in {output}", highlight=False)
    if failed:
        raise typer.Exit(1)
