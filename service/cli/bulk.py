"""`vitrail bulk`."""

from typing import Annotated

import typer

from service.cli.client import errors
from service.cli.serve import Catalog, Device
from service.cli.starting import read_settings, report_errors


def bulk(
    task: Annotated[str, typer.Argument(help="classify, embed, segment, ...")],
    source: Annotated[
        str, typer.Argument(help="A folder, .parquet or .tar file, or a URI such as s3://...")
    ],
    output: Annotated[str, typer.Argument(help="Folder of Parquet files, a path or URI.")],
    model: Annotated[str | None, typer.Option(help="The catalog's default for the task.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the task, as name=value; repeatable.")
    ] = None,
    catalog: Catalog = None,
    device: Device = None,
    lance: Annotated[
        bool,
        typer.Option("--lance", help="At the end, write all rows as OUTPUT/results.lance, too."),
    ] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Most image files in a shard.")] = 1000,
    ray: Annotated[
        str | None, typer.Option(help="Run on the Ray cluster of this address; auto, or local.")
    ] = None,
    actors: Annotated[int, typer.Option(min=1, help="On Ray: how many load the model.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="On Ray: cores of each.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="On Ray: GPUs of each.")] = 0,
) -> None:
    """Run a task on many images without a server. A run that was interrupted continues.

    Bad images become rows with an error.
    """
    from rich.progress import Progress

    from models.catalog import load_catalog
    from service.bulk.job import Job, Results, output_columns
    from service.bulk.running import Cluster, run_here, run_on_ray
    from service.bulk.shards import SourceFormatError, list_shards
    from service.errors import ServiceError
    from service.parameters import validated_call

    flags = {"catalog": catalog, "device": device, "log_level": "warning"}
    settings = read_settings(flags, serves=False)
    try:
        with report_errors():
            known = load_catalog(settings.catalog)
            entry = known.model(model) if model else known.default_model(task)
            values = dict(item.partition("=")[::2] for item in option or ())
            call = validated_call(entry.name, task, values)
            job = Job(task=task, model=entry.name, source=source, output=output,
                      options=dict(call.options))  # fmt: skip
            output_columns(job)  # refuses what cannot be written
            shards = list_shards(source, shard_size)
            results = Results(job)
            done = results.open()
            left = [shard for shard in shards if shard.name not in done]
            images = failed = 0
            with Progress(console=errors, disable=not errors.is_terminal) as progress:
                bar = progress.add_task(task, total=len(shards), completed=len(shards) - len(left))
                if left:
                    cluster = Cluster(address=ray or "", actors=actors, cpus=cpus, gpus=gpus)
                    counts = (
                        run_here(settings, job, left)
                        if ray is None
                        else run_on_ray(settings, job, left, cluster)
                    )
                    for count, bad in counts:
                        images, failed = images + count, failed + bad
                        progress.advance(bar)
            results.check_digests()
            if lance:
                results.write_lance()
    except (SourceFormatError, ServiceError) as error:
        errors.print(f"vitrail: {error}", markup=False, highlight=False)
        raise typer.Exit(2) from error
    skipped = len(shards) - len(left)
    errors.print(
        f"{images} images in {len(left)} shards, {failed} failed; {skipped} shards were done",
        highlight=False,
    )
