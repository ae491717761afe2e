"""`vitrail fit FOLDER`: fit a head to labelled images, on this machine."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.cli.client import Key, connect, errors
from service.cli.models import CatalogName


def fit(
    images: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="A folder with a folder per class, or a .csv file with columns path and label.",
        ),
    ],
    trunk: Annotated[str, typer.Option(help="A trunk of the catalog.")],
    name: Annotated[str, typer.Option(help="The head's name.")],
    kind: Annotated[str, typer.Option(help="vqt or linear.")] = "vqt",
    catalog: CatalogName = "demo",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the head and the report; ./NAME by default.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A server to upload the head to.")] = None,
    replace: Annotated[
        bool, typer.Option(help="Replace a head of that name on the server.")
    ] = False,
    key: Key = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    holdout: Annotated[float, typer.Option(help="Share of each class that is held out.")] = 0.2,
    epochs: Annotated[int, typer.Option(help="Most epochs.")] = 100,
    patience: Annotated[
        int, typer.Option(help="Epochs without improvement before training stops.")
    ] = 15,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of AdamW.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per training step.")] = 32,
    queries: Annotated[int, typer.Option(help="vqt: query tokens per block.")] = 1,
    layers: Annotated[
        int,
        typer.Option(
            help="linear: last blocks whose class tokens are read; 0 for the pooled output."
        ),
    ] = 0,
    keep: Annotated[float, typer.Option(help="Share of the features to keep.")] = 1.0,
    lasso: Annotated[
        float, typer.Option(help="Weight of the group lasso that selects the features to keep.")
    ] = 1e-4,
) -> None:
    """Fit a head to labelled images, on a frozen trunk."""
    from models.errors import ModelsError
    from models.fitting.options import FitOptions

    optional = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    options = FitOptions(
        kind=kind,
        seed=seed,
        holdout=holdout,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        queries=queries,
        layers=layers,
        keep=keep,
        lasso=lasso,
        **{name: value for name, value in optional.items() if value is not None},
    )
    folder = output or Path(name)
    try:
        report = _fit(images, catalog, trunk, device, options, folder / f"{name}.safetensors")
    except (ModelsError, OSError) as error:
        typer.echo(f"vitrail: {error}", err=True)
        raise typer.Exit(1) from error
    for skipped in report["skipped"]:
        text = f"skipped {skipped['name']}: {skipped['reason']}"
        errors.print(text, markup=False, highlight=False)
    typer.echo(
        f"{name}: {report['holdout_accuracy']:.1%} of {report['holdout_images']} held-out images "
        f"({report['images']} images, {report['classes']} classes, {report['seconds']:.0f} s); "
        f"see {folder}"
    )
    if url is not None:
        _upload(folder / f"{name}.safetensors", name, url, key, replace)


def _fit(
    images: Path, catalog: str, trunk_name: str, device: str, options: Any, path: Path
) -> dict[str, Any]:
    from models.fitting.dataset import Progress as Step
    from models.fitting.examples import read_examples
    from models.fitting.fit import fit, run_directly
    from models.fitting.report import write_report
    from models.heads.files import save_head
    from models.registry import Registry

    options.check()
    examples = read_examples(images)
    loaded = Registry.from_catalog(catalog, device=device).load_trunk(trunk_name)
    trunk = loaded.trunk
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with (
        Progress(*columns, console=errors, disable=not errors.is_terminal) as bars,
        tempfile.TemporaryDirectory(prefix="vitrail-fit-") as folder,
    ):
        bar_of: dict[str, Any] = {}

        def show(step: Step) -> None:
            if step.stage not in bar_of:
                bar_of[step.stage] = bars.add_task(step.stage, total=step.total, note="")
            note = "" if step.accuracy is None else f"{step.accuracy:.1%} held out"
            bars.update(bar_of[step.stage], completed=step.done, note=note)

        fitted = fit(
            examples,
            trunk,
            trunk_name,
            options,
            Path(folder),
            run=run_directly(trunk),
            progress=show,
            trunk_source=loaded.source,
        )
    save_head(fitted.head, path)
    write_report(fitted.report, path.parent)
    return fitted.report


def _upload(path: Path, name: str, url: str, key: str | None, replace: bool) -> None:
    with connect(url, key) as client:
        parameters = {"name": name, "replace": replace}
        files = {"file": (path.name, path.read_bytes())}
        client.request("POST", "/heads", params=parameters, files=files)
    typer.echo(f"{name} is served by {url}")
