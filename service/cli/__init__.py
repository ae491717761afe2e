"""The `vitrail` command. Heavy imports wait until a command needs them."""

import signal
from importlib import metadata
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
    plan,
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

START, SERVE, IMAGES, MODELS = "Start here", "Serve", "Images, with a server", "Models"

# The first panel is shown first.
app.command("demo", rich_help_panel=START)(demo.demo)
app.command("doctor", rich_help_panel=START)(doctor.doctor)
app.command("serve", rich_help_panel=START)(serve.serve)
for task in tasks().values():
    if "image" in task.modalities:
        made = task_command(task, **SPECIAL.get(task.name, {}))
        app.command(task.name, rich_help_panel=IMAGES)(made)
for name, command, panel in (
    ("gateway", serve.gateway, SERVE),
    ("worker", serve.worker, SERVE),
    ("ray", ray.ray, SERVE),
    ("health", health.health, SERVE),
    ("index", collections.index, IMAGES),
    ("search", retrieval.search, IMAGES),
    ("fit", fit.fit, MODELS),
    ("tune", tune.tune, MODELS),
    ("plan", plan.plan, MODELS),
    ("bulk", bulk.bulk, MODELS),
):
    app.command(name, rich_help_panel=panel)(command)
models.app.command("verify")(verify.verify)
app.add_typer(models.app, name="models", rich_help_panel=MODELS)
app.add_typer(keys.app, name="keys", rich_help_panel=SERVE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitrail {metadata.version('vitrail')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Serve vision transformers: any published checkpoint in, exact output out."""


def main() -> None:
    """Entry point."""
    # Only a supervisor does something about it. Other processes would end at once.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    app()
