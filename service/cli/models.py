"""`vitrail models`: commands for catalogs and checkpoint files, which need no server."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from service.cli.tables import table_console

app = typer.Typer(help="Catalogs and checkpoint files.", no_args_is_help=True)

CatalogName = Annotated[
    str, typer.Option("--catalog", envvar="VITRAIL_CATALOG", help="demo, hub, or a TOML file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE that the file does not contain, such as num_heads=6."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

T = TypeVar("T")

# Widths from which on a table has these columns.
DESCRIPTION_WIDTH = 72
LICENCE_WIDTH = 120


@app.command("list")
def list_models(catalog: CatalogName = "demo", as_json: Json = False) -> None:
    """List the models of a catalog."""
    from models.catalog import load_catalog

    entries = or_exit(lambda: load_catalog(catalog))
    if as_json:
        rows = [
            {**asdict(model), "source": entries.trunks[model.trunk].source}
            for model in entries.models.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    console = table_console()
    table = Table(box=None, pad_edge=False)
    for column in ("model", "task", "parameters"):
        table.add_column(column, no_wrap=True)
    if console.width >= DESCRIPTION_WIDTH:
        table.add_column("description")
    if console.width >= LICENCE_WIDTH:
        table.add_column("licence")
    for model in entries.models.values():
        default = "*" if entries.defaults.get(model.task) == model.name else ""
        row = (model.name, model.task + default, model.parameters, model.description, model.licence)
        table.add_row(*row[: len(table.columns)])
    console.print(table)
    console.print("* the default of its task; `--json` has everything")


@app.command()
def copy(
    catalog: Annotated[str, typer.Argument(help="A built-in catalog: published, hub, demo.")],
    file: Annotated[Path, typer.Argument(help="A .toml file to write.")],
) -> None:
    """Copy a built-in catalog to a file, to edit it. `file:` sources are relative to the file."""
    from models.catalog import load_catalog

    path = or_exit(lambda: load_catalog(catalog)).path
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(path.read_text(encoding="utf-8"))
    except OSError as error:
        typer.echo(f"vitrail: {file}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{file}: {catalog}")


@app.command()
def pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models; by default the start-up models.")
    ] = None,
    catalog: CatalogName = "demo",
) -> None:
    """Download and convert models, so that the server can start without the network."""
    from models.registry import Registry

    def pull_all() -> None:
        registry = Registry.from_catalog(catalog, device="cpu")
        for name in names or registry.catalog.startup:
            registry.get(name)
            typer.echo(f"{name}: ready in {registry.store.root}")

    or_exit(pull_all)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint file.")],
    architecture: Annotated[
        str | None, typer.Option(help="timm's name, if the file does not identify it.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Describe a checkpoint file: format and why, architecture, size, classes, preprocessing."""
    described = or_exit(lambda: _describe(file, to_arguments(architecture, settings)))
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for key, value in described.items():
        typer.echo(f"{key:>14}  {value}")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint file.")],
    output: Annotated[Path, typer.Argument(help="A .safetensors file to write.")],
    architecture: Annotated[
        str | None, typer.Option(help="timm's name, if the file does not identify it.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Convert a checkpoint to one safetensors file that loads without further arguments."""
    from models.assembly import load_checkpoint
    from models.checkpoints.checkpoint import save_checkpoint
    from models.checkpoints.loading import read_checkpoint
    from models.errors import CheckpointError

    def convert_file() -> None:
        if output.suffix != ".safetensors":
            raise CheckpointError(f"{output}: the file to write must end with .safetensors")
        arguments = to_arguments(architecture, settings)
        load_checkpoint(file, arguments)  # raises if the converted file would not load
        save_checkpoint(read_checkpoint(file, arguments), output)
        typer.echo(f"{output}: {output.stat().st_size} bytes")

    or_exit(convert_file)


def to_arguments(architecture: str | None, settings: list[str] | None) -> dict[str, Any]:
    """The arguments of a checkpoint from flags. A value that is not JSON is text."""
    arguments: dict[str, Any] = {"architecture": architecture} if architecture else {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} is not NAME=VALUE")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _describe(file: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    from models.assembly import load_checkpoint
    from models.checkpoints.loading import read_checkpoint

    checkpoint = read_checkpoint(file, arguments)
    model = load_checkpoint(file, arguments)
    trunk = model.trunk
    towers = [trunk] if model.text in (None, trunk) else [trunk, model.text]
    return {
        "format": checkpoint.format,
        "because": checkpoint.reason,
        "architecture": checkpoint.architecture,
        "arguments": dict(checkpoint.arguments),
        "task": model.task,
        "parameters": sum(trunk.parameter_count for trunk in towers),
        "classes": trunk.num_classes,
        "heads": sorted(checkpoint.heads),
        "dropped": list(checkpoint.dropped),
        "assumed": dict(checkpoint.assumed),
        "preprocess": asdict(trunk.preprocess),
        "digest": model.digest,
    }


def or_exit(work: Callable[[], T]) -> T:
    """The result of `work`. An error of the library is reported in one line, with exit status 1."""
    from models.errors import ModelsError

    try:
        return work()
    except ModelsError as error:
        typer.echo(f"vitrail: {error}", err=True)
        raise typer.Exit(1) from error
