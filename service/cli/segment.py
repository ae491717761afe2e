"""`vitrail segment`: also writes masks to a folder."""

import base64
from collections.abc import Iterable
from pathlib import Path

import typer

from models.tasks.base import Task
from service.cli.client import Client, Entry, expand
from service.cli.task_commands import Invocation, run_task


def run_segment(task: Task, invocation: Invocation, *, overlays: bool) -> None:
    """As `run_task`; with a folder as `--output`, each mask is written as soon as it is ready."""
    output = invocation.output
    folder = output if output is not None and not output.suffix else None
    if overlays and folder is None:
        raise typer.BadParameter("--overlays needs a folder as --output")
    if folder is None:
        run_task(task, invocation)
        return
    if invocation.options["output"] not in (None, "png"):
        raise typer.BadParameter("a folder as --output takes masks of --form png")
    folder.mkdir(parents=True, exist_ok=True)
    with invocation.client(task, MaskClient) as masks:
        masks.folder, masks.overlays = folder, overlays
        masks.names = file_names(invocation.paths)
        masks.run(invocation.paths, invocation.as_json, None, task.line, show=invocation.show)


class MaskClient(Client):
    """Writes each mask to `folder`; with `overlays` also a picture of it on the image, which takes
    a second request."""

    folder: Path
    overlays: bool
    names: dict[Path, str]

    def ask(self, path: Path) -> Entry:
        entry = super().ask(path)
        if "error" in entry:
            return entry
        try:
            name = self.names[path]
            (self.folder / f"{name}.png").write_bytes(base64.b64decode(entry["mask"]))
            if self.overlays:
                overlay = self.post_image(path.read_bytes(), output="overlay")
                if "error" in overlay:
                    return overlay
                content = base64.b64decode(overlay["mask"])
                (self.folder / f"{name}.overlay.png").write_bytes(content)
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return entry


def file_names(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each image: `photos_cat` for `cat.jpg` in the given folder `photos`, `cat` for a
    file that was given itself. Images that would share a name get numbers."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for given in paths:
        for path in expand([given]):
            if path in names:
                continue
            parts = [given.resolve().name, *path.relative_to(given).parent.parts]
            prefix = "".join(f"{part}_" for part in parts) if given.is_dir() else ""
            name = plain = prefix + path.stem
            number = 1
            while name in taken:
                number += 1
                name = f"{plain}-{number}"
            names[path] = name
            taken.add(name)
    return names
