"""`vitrail tune MODEL`: measure which settings are the fastest on this machine."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from service.cli.models import CatalogName
from service.cli.starting import report_errors
from service.cli.tables import table_console

if TYPE_CHECKING:
    from models.catalog import Catalog
    from service.tuning.search import TuneRequest, TuneResult

MAX_IMAGES = 64
MAX_COMPARED = 32
SAMPLES = 8


def tune(
    model: Annotated[str, typer.Argument(help="A model of the catalog that takes images.")],
    catalog: CatalogName = "demo",
    seconds: Annotated[float, typer.Option(min=1, help="About how long to measure.")] = 120,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder of typical images: to measure with, and to calibrate int8 on.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest error over the largest value, compared with eager float32, that the "
            "chosen settings may have; by default the trunk's own tolerance, or 1e-5.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    write: Annotated[
        bool, typer.Option("--write", help="Write the best into the catalog.")
    ] = False,
) -> None:
    """Measure which engine, precision, transform, streams and batch size are the fastest here.

    Requests run through the same queues and threads as in a server, without
    HTTP. The machine should be idle.
    """
    from models.catalog import load_catalog
    from models.catalog_file import check_writable, update_trunk
    from service.errors import ServiceError
    from service.tuning.search import Search

    with report_errors():
        loaded = load_catalog(catalog)
        if write:
            check_writable(loaded.path)
        request = _request(loaded, model, seconds, images, tolerance, device)
        errors = Console(stderr=True)
        try:
            with errors.status("") as status:
                result = asyncio.run(Search(request, status.update).run())
        except ServiceError as error:
            typer.echo(f"vitrail: {model}: {error.detail}", err=True)
            raise typer.Exit(2) from error
        _print(result, request)
        trunk = loaded.models[model].trunk
        settings = result.best.trunk_settings(request.calibration)
        if write:
            update_trunk(loaded.path, trunk, settings)
            typer.echo(f"\nwritten to [trunks.{trunk}] of {loaded.path}:")
        else:
            typer.echo(f"\nfor [trunks.{trunk}] of your own catalog; --write writes it there:")
        for key, value in settings.items():
            typer.echo(f"{key} = {_toml(value)}")
        typer.echo(f"\nand for the server: VITRAIL_STREAMS={result.best.streams}")


def _request(
    catalog: "Catalog",
    model: str,
    seconds: float,
    folder: Path | None,
    tolerance: float | None,
    device: str,
) -> "TuneRequest":
    from models.errors import CatalogError
    from models.trunks.calibration import read_calibration
    from service.tuning.search import TuneRequest

    entry = catalog.model(model)
    trunk = catalog.trunks[entry.trunk]
    if trunk.tower == "text":
        raise CatalogError(f"{model} takes texts; tune measures models that take images")
    calibration = trunk.calibration
    if folder is not None:
        files = read_calibration(folder)
        images = [path.read_bytes() for path in files.files[:MAX_IMAGES]]
        held_out = [path.read_bytes() for path in files.held_out[:MAX_COMPARED]]
        calibration = os.path.relpath(folder.resolve(), catalog.path.parent.resolve())
    else:
        images, held_out = _samples(), []
    return TuneRequest(
        catalog=catalog,
        model=model,
        device=device,
        seconds=seconds,
        tolerance=tolerance if tolerance is not None else trunk.tolerance or 1e-5,
        images=images,
        compared=held_out or images[:MAX_COMPARED],
        calibration=calibration,
    )


def _samples() -> list[bytes]:
    """The package's photos, encoded."""
    import io

    from models.inputs.samples import sample_photos

    encoded = []
    for photo in sample_photos(SAMPLES):
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def _print(result: "TuneResult", request: "TuneRequest") -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("engine", "precision", "transform", "streams", "batch"):
        table.add_column(column, no_wrap=True)
    for column in ("images/s", "lone ms", "error", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in result.measurements.values():
        candidate, agreement = each.candidate, each.agreement
        score = ""
        if agreement is not None:
            top1, cosine = agreement.top1_agreement, agreement.cosine
            score = f"{top1:.1%}" if top1 is not None else f"cos {cosine:.4f}"
        table.add_row(
            candidate.engine,
            candidate.precision,
            candidate.transform,
            str(candidate.streams),
            str(candidate.max_batch_size),
            f"{each.images_per_s:.1f}",
            f"{each.lone_ms:.1f}",
            "" if agreement is None else f"{each.error:.1e}",
            score,
            style="bold" if candidate == result.best else None,
        )
    table_console().print(table)
    for skipped in result.skipped:
        typer.echo(f"skipped {skipped.candidate}: {skipped.reason}", err=True)
    typer.echo(f"best within the tolerance of {request.tolerance:.0e}: {result.best}")


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
