"""`vitrail models verify`: a model as it is served, compared with independent references."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.models import CatalogName, Json, Settings, or_exit, to_arguments

if TYPE_CHECKING:
    from models.verification.comparison import Comparison

Name = Annotated[str, typer.Argument(help="A model of the catalog, or a checkpoint file.")]
Images = Annotated[
    Path | None, typer.Option(help="A folder of images; the package's own photos without it.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Largest error over the largest value that passes; by default the catalog's, or 1e-5 "
        "for float32 with the exact transform. Others must have a top-1 agreement and cosine of "
        "0.99.",
    ),
]
Device = Annotated[str, typer.Option(envvar="VITRAIL_DEVICE", help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[
    str, typer.Option(envvar="VITRAIL_PRECISION", help="auto, float32, bfloat16, ...")
]
EngineName = Annotated[str, typer.Option(envvar="VITRAIL_ENGINE", help="auto, eager, ...")]
TransformName = Annotated[str, typer.Option(envvar="VITRAIL_TRANSFORM", help="exact, fast or gpu.")]


def verify(
    name: Name,
    catalog: CatalogName = "demo",
    images: Images = None,
    settings: Settings = None,
    tolerance: Tolerance = None,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: EngineName = "auto",
    transform: TransformName = "exact",
    as_json: Json = False,
) -> None:
    """Compare a model as it is served with eager float32, and with the library of its network.

    The exit status is 1 if they do not agree.
    """
    comparisons = []

    def compare() -> None:
        from models.verification.targets import ServedAs, catalog_target, file_target
        from models.verification.verify import read_photos, verify

        served_as = ServedAs(device=device, precision=precision, engine=engine, transform=transform)
        path, arguments = Path(name), to_arguments(None, settings)
        photos = read_photos(images)
        if path.is_file():
            target = file_target(path, arguments, served_as)
        else:
            target = catalog_target(name, catalog, served_as)
        compared = verify(target.served, target.eager, target.libraries, photos, tolerance)
        for comparison in compared:
            comparisons.append(comparison)
            if not as_json:
                typer.echo(describe(comparison))
        if as_json:
            trunk = target.served.trunk
            typer.echo(
                json.dumps(
                    {
                        "model": name,
                        "engine": trunk.engine.report().name,
                        "precision": trunk.placement.precision,
                        "transform": trunk.placement.transform,
                        "comparisons": [comparison.to_json() for comparison in comparisons],
                    },
                    indent=2,
                )
            )

    or_exit(compare)
    if not all(comparison.passed for comparison in comparisons):
        raise typer.Exit(1)


def describe(comparison: "Comparison") -> str:
    """A comparison as one line of text."""
    if not comparison.errors:
        return f"{'-':4}  {comparison.reference}"
    parts = [f"{name} {error:.1e}" for name, error in comparison.errors.items()]
    if comparison.top1_agreement is not None:
        parts.append(f"top-1 agreement {comparison.top1_agreement:.1%}")
    if comparison.cosine is not None:
        parts.append(f"smallest cosine {comparison.cosine:.6f}")
    verdict = "ok" if comparison.passed else "FAIL"
    compared = f"on {comparison.inputs} inputs"
    return f"{verdict:4}  {comparison.reference}: {', '.join(parts)}, {compared}"
