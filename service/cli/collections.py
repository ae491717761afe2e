"""`vitrail index`: keeps a collection of the server up to date with folders of images."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer
from rich.progress import Progress

from service.cli.client import Key, Model, Url, connect, errors, expand
from service.search.folders import ImageFile
from vitrail_client import Client, VitrailError
from vitrail_client.call import INPUT_STATUSES
from vitrail_client.protocol import DEFAULT_URL

DELETED = 1000  # images that one request deletes
CONTINUE = "; what was added stays: run the command again to add the rest"
# What an image's metadata is compared with, by its id.
Known = dict[str, dict[str, Any]]
Show = Callable[[int, int | None], None]


@dataclass(slots=True)
class Outcome:
    """What became of the files: their ids, and of those that failed what is wrong. Also of the
    folders that cannot be read."""

    added: int = 0
    unchanged: int = 0
    ids: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Count the server's result for a file."""
        self.ids.add(name)
        if "error" in result:
            self.failed[name] = result["error"]["detail"]
        elif "unchanged" in result:
            self.unchanged += 1
        else:
            self.added += 1


def index(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    collection: Annotated[str, typer.Option(help="Its name; created if there is none.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    model: Model = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the images of these folders that are gone.")
    ] = False,
    thumbnails: Annotated[
        bool, typer.Option(help="Store small pictures, which the page shows beside its hits.")
    ] = True,
    on_server: Annotated[
        bool,
        typer.Option("--on-server", help="The folders are the server's (VITRAIL_IMAGE_FOLDERS)."),
    ] = False,
) -> None:
    """Add images to a collection, which `vitrail search NAME` searches.

    An image's id is its path; the whole one, if it was given with `..`. Files
    that are there already, with the same size and time, are left as they are:
    run it again to add what is new or changed, or to continue after an
    interruption.
    """
    missing = [path for path in paths if not on_server and not path.exists()]
    if missing:
        raise typer.BadParameter(f"{missing[0]} does not exist")
    if not on_server:  # no id can have a part ..
        paths = [path.resolve() if ".." in path.parts else path for path in paths]
    with Progress(console=errors, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("index", total=None)

        def show(done: int, total: int | None) -> None:
            progress.update(bar, completed=done, total=total)

        with connect(url, key, advice=CONTINUE, progress=show) as client:
            _create(client, collection, model)
            known = {} if on_server and not delete else _known(client, collection)
            if on_server:
                outcome = _add_server_folders(
                    client, collection, paths, show, thumbnails=thumbnails
                )
            else:
                outcome = _add_files(client, collection, paths, known, thumbnails=thumbnails)
            if not outcome.ids:
                errors.print("no image among the given paths")
                raise typer.Exit(1)
            gone = list(_gone(known, paths, outcome)) if delete else []
            gone = [image for image in gone if on_server or _is_missing(image)]
            deleted = 0
            for start in range(0, len(gone), DELETED):
                deleted += client.delete_images(collection, gone[start : start + DELETED])
                show(deleted, len(gone))
            count = client.collection(collection)["images"]
    for name, detail in outcome.failed.items():
        errors.print(f"{name}: {detail}", markup=False, highlight=False)
    counts = [f"{outcome.added} images added", f"{outcome.unchanged} unchanged"]
    counts += [f"{deleted} deleted"] if delete else []
    errors.print(f"{', '.join(counts)}, {count} in {collection}", highlight=False)
    if outcome.failed:
        raise typer.Exit(1)


def _create(client: Client, name: str, model: str | None) -> None:
    """Create the collection, unless it exists; with `model` if that is given.

    Raises:
        VitrailError: it exists with another model.
    """
    try:
        if model in (None, client.collection(name)["model"]):
            return
    except VitrailError as error:
        if error.status != 404:
            raise
    client.create_collection(name, model=model)


def _known(client: Client, collection: str) -> Known:
    """The images that the collection has."""
    known: Known = {}
    after = None
    while True:
        page = client.images(collection, after=after)
        known |= {image["id"]: image["metadata"] for image in page["images"]}
        if (after := page["next"]) is None:
            return known


def _add_files(
    client: Client, collection: str, paths: list[Path], known: Known, *, thumbnails: bool
) -> Outcome:
    """Send the files that are new or changed."""
    from service.cli.thumbnails import make_thumbnail

    outcome = Outcome()
    new: list[ImageFile] = []
    for path in expand(paths):
        try:
            file = ImageFile.of(str(path), path.stat())
        except OSError as error:
            outcome.add(str(path), _problem(error.strerror or str(error)))
            continue
        if file.is_unchanged(known.get(file.path, {})):
            outcome.add(file.path, {"unchanged": True})
        elif not os.access(path, os.R_OK):
            outcome.add(file.path, _problem("the file cannot be read"))
        elif not file.path.isprintable():
            outcome.add(ascii(file.path), _problem("its path cannot be an id"))
        else:
            new.append(file)
    try:
        results = client.add_images(
            collection,
            [file.path for file in new],
            ids=[file.path for file in new],
            metadata=[file.metadata for file in new],
            thumbnail=make_thumbnail if thumbnails else None,
        )
    except VitrailError as error:
        if len(new) != 1 or error.status not in INPUT_STATUSES:
            raise
        results = [{"error": error.problem}]  # a request with one image fails as a whole
    for file, result in zip(new, results, strict=True):
        outcome.add(file.path, result)
    return outcome


def _add_server_folders(
    client: Client, collection: str, paths: Sequence[Path], show: Show, *, thumbnails: bool
) -> Outcome:
    """Let the server add its folders, page after page."""
    outcome = Outcome()
    options = {} if thumbnails else {"thumbnails": False}  # an older server makes none
    for folder in paths:
        after = None
        while True:
            page = client.add_folder(collection, str(folder), after=after, **options)
            for result in page["results"]:
                outcome.add(result["id"], result)
            show(len(outcome.ids), None)
            if (after := page["next"]) is None:
                break
    return outcome


def _gone(known: Known, paths: Sequence[Path], outcome: Outcome) -> Iterator[str]:
    """The ids of known images in the given folders whose files are not present. What is below a
    folder that cannot be read may be."""
    unread = {PurePath(name) for name in outcome.failed}
    for name in sorted(known.keys() - outcome.ids):
        path = PurePath(name)
        if not unread.isdisjoint(path.parents):
            continue
        if any(path.is_relative_to(p) and ".." not in path.relative_to(p).parts for p in paths):
            yield name


def _is_missing(path: str) -> bool:
    """Whether there is certainly no such file: not if a folder on the way cannot be read."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _problem(detail: str) -> dict[str, Any]:
    return {"error": {"detail": detail}}
