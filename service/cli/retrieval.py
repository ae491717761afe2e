"""`vitrail embed` and `vitrail search`: folders to vectors, and nearest ones by image or text."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from service.cli.client import (
    DEFAULT_URL,
    Client,
    Concurrency,
    Json,
    Key,
    Model,
    Paths,
    Url,
    errors,
    expand,
)


def embed(
    paths: Paths,
    url: Url = DEFAULT_URL,
    key: Key = None,
    model: Model = None,
    pooling: Annotated[str | None, typer.Option(help="cls, mean, max, gem or ggem.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Keep the first so many.")] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None,
        typer.Option(help="A .parquet or .npy file; an interrupted run is resumed."),
    ] = None,
    concurrency: Concurrency = 8,
) -> None:
    """Embed images for retrieval, any number of them."""
    parameters = {"model": model, "pooling": pooling, "dimensions": dimensions}
    client = Client(url, key, "embed", parameters, concurrency)
    if output is not None:
        _write_index(client, paths, output, pooling)
        return

    def line(answer: dict[str, Any]) -> str:
        vector = answer["embedding"]
        return f"{len(vector)} dimensions: {', '.join(f'{v:.4f}' for v in vector[:4])}, ..."

    client.run(paths, as_json, None, line)


def search(
    index: Annotated[Path, typer.Argument(exists=True, help="What `vitrail embed` wrote.")],
    image: Annotated[Path | None, typer.Option(exists=True, help="Find its likes.")] = None,
    text: Annotated[str | None, typer.Option(help="Find what it says.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Search an index for the nearest images, by cosine similarity, exactly."""
    if (image is None) == (text is None):
        raise typer.BadParameter("search by --image, or by --text")
    import numpy as np
    from usearch.index import MetricKind
    from usearch.index import search as nearest

    from service.cli.index import IndexFileError, read_index

    try:
        found = read_index(index)
    except IndexFileError as error:
        errors.print(str(error), highlight=False)
        raise typer.Exit(1) from error
    wanted = {"model": found.made_by.model, "pooling": found.made_by.pooling}
    client = Client(url, key, "embed", wanted, 1)
    answer = client.ask(image) if image is not None else client.ask_text(str(text))
    if "error" in answer:
        errors.print(str(answer["error"]), markup=False, highlight=False)
        raise typer.Exit(1)
    if answer["model_digest"] != found.made_by.model_digest:
        errors.print(
            f"{index} was made by another {found.made_by.model} than the server now has; "
            "embed the folder again"
        )
        raise typer.Exit(1)
    query = np.array(answer["embedding"], np.float32)[: found.vectors.shape[1]]
    count = min(top, len(found.paths))
    matches = nearest(np.asarray(found.vectors), query, count, MetricKind.Cos, exact=True)
    for position, distance in zip(matches.keys.tolist(), matches.distances.tolist(), strict=True):
        score, path = 1 - distance, found.paths[position]
        typer.echo(
            json.dumps({"path": path, "score": score}) if as_json else f"{score:.3f}  {path}"
        )


def _write_index(client: Client, paths: list[Path], output: Path, pooling: str | None) -> None:
    from service.cli.index import IndexFileError, IndexWriter, MadeBy

    try:
        writer = IndexWriter(output)
        done = writer.done()
        files = [path for path in expand(paths) if str(path) not in done]
        if not files and not done:
            errors.print("no image among the paths given")
            raise typer.Exit(1)
        if done:
            errors.print(f"{len(done)} images are done already", highlight=False)
        with Progress(console=errors, disable=not errors.is_terminal) as progress:
            bar = progress.add_task("embed", total=len(files) + len(done), completed=len(done))
            try:
                for path, answer in client.ask_all(files):
                    if "error" in answer:
                        errors.print(f"{path}: {answer['error']}", markup=False, highlight=False)
                        writer.add(str(path), None, str(answer["error"]))
                    else:
                        names = ("model", "model_digest", "preprocess_digest")
                        writer.check(MadeBy(**{n: answer[n] for n in names}, pooling=pooling))
                        writer.add(str(path), answer["embedding"], None)
                    progress.advance(bar)
            except BaseException:
                writer.flush()  # what is done so far need not be done again
                raise
        rows, failed = writer.finish()
    except IndexFileError as error:
        errors.print(str(error), highlight=False)
        raise typer.Exit(1) from error
    errors.print(f"{rows} vectors in {output}", highlight=False)
    if failed:
        raise typer.Exit(1)
