"""`vitrail models list|pull|inspect`: the catalog and checkpoint files, without a server."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Catalogs and checkpoint files.", no_args_is_help=True)

CatalogName = Annotated[
    str, typer.Option("--catalog", envvar="VITRAIL_CATALOG", help="demo, hub, or a TOML file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

T = TypeVar("T")


@app.command("list")
def list_models(catalog: CatalogName = "demo", as_json: Json = False) -> None:
    """Show what a catalog declares."""
    from models.catalog import load_catalog

    entries = _or_exit(lambda: load_catalog(catalog))
    if as_json:
        rows = [
            {**asdict(model), "source": entries.trunks[model.trunk].source}
            for model in entries.models.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    table.add_column("model", no_wrap=True)
    for column in ("task", "parameters", "licence", "description"):
        table.add_column(column)
    for model in entries.models.values():
        default = " (default)" if entries.defaults.get(model.task) == model.name else ""
        task = model.task + default
        table.add_row(model.name, task, model.parameters, model.licence, model.description)
    Console().print(table)


@app.command()
def pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models; the start-up list if none.")
    ] = None,
    catalog: CatalogName = "demo",
) -> None:
    """Download and convert models now, so that the server starts without the network."""
    from models.registry import Registry

    def pull_all() -> None:
        registry = Registry.from_catalog(catalog, device="cpu")
        for name in names or registry.catalog.startup:
            registry.get(name)
            typer.echo(f"{name}: ready in {registry.store.root}")

    _or_exit(pull_all)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint file.")],
    architecture: Annotated[
        str | None, typer.Option(help="timm's name, where the file does not tell.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a checkpoint file is: format and why, architecture, size, classes, transform."""
    described = _or_exit(lambda: _describe(file, architecture))
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for key, value in described.items():
        typer.echo(f"{key:>14}  {value}")


def _describe(file: Path, architecture: str | None) -> dict[str, Any]:
    from models.loading import load_checkpoint, read_checkpoint

    arguments = {"architecture": architecture} if architecture else {}
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
        "parameters": sum(p.numel() for t in towers for p in t.network.parameters()),
        "classes": trunk.num_classes,
        "heads": sorted(checkpoint.heads),
        "dropped": list(checkpoint.dropped),
        "preprocess": asdict(trunk.preprocess),
        "digest": model.digest,
    }


def _or_exit(work: Callable[[], T]) -> T:
    """Run, and tell an error of ours in one line instead of a traceback."""
    from models.errors import ModelsError

    try:
        return work()
    except ModelsError as error:
        typer.echo(f"vitrail: {error}", err=True)
        raise typer.Exit(1) from error
