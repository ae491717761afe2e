"""The `vitrail` command. Heavy imports wait until a command needs them."""

from typing import Annotated, Any

import typer

from models.tasks.table import tasks
from service.cli import (
    bulk,
    collections,
    demo,
    doctor,
    fit,
    health,
    keys,
    models,
    ray,
    retrieval,
    serve,
    tune,
    verify,
)
from service.cli.retrieval import run_embed
from service.cli.segment import run_segment
from service.cli.task_commands import flag_parameter, task_command

app = typer.Typer(
    help="Serve vision transformers: any published checkpoint in, exact output out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

OVERLAYS = typer.Option("--overlays", help="Beside each mask, a picture of it on the image.")
# The tasks whose commands do more than print lines or write a table.
SPECIAL: dict[str, dict[str, Any]] = {
    "segment": {
        "run": run_segment,
        "output_help": "A .parquet file, or a folder for the masks as PNG.",
        "flags": [flag_parameter("overlays", Annotated[bool, OVERLAYS], False)],
    },
    "embed": {
        "run": run_embed,
        "output_help": "A .parquet or .npy file; an interrupted run is resumed.",
    },
}

for command in (serve.serve, serve.gateway, serve.worker, health.health):
    app.command(command.__name__)(command)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("fit")(fit.fit)
app.command("tune")(tune.tune)
app.command("ray")(ray.ray)
app.command("bulk")(bulk.bulk)
models.app.command("verify")(verify.verify)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
for task in tasks().values():
    if "image" in task.modalities:
        app.command(task.name)(task_command(task, **SPECIAL.get(task.name, {})))
app.command("index")(collections.index)
app.command("search")(retrieval.search)


def main() -> None:
    """Entry point."""
    app()
