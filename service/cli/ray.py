"""`vitrail ray`."""

from typing import Annotated

import typer

from service.cli.serve import Catalog, GrpcPort, Host, LogLevel, Models, Port
from service.cli.starting import read_settings, report_errors
from service.cli.summary import summarize_when_ready


def ray(
    catalog: Catalog = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster; auto for this machine's; none to start a local Ray."),
    ] = None,
    host: Host = None,
    port: Port = None,
    grpc_port: GrpcPort = None,
    models: Models = None,
    log_level: LogLevel = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Fewest replicas of each group of trunks.")
    ] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Most; they are added by the waiting work.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Cores of a replica.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica, e.g. 0.25.")] = 0,
) -> None:
    """Serve a catalog with Ray Serve: this process is the gateway, Ray runs the models.

    Every setting can also be set as VITRAIL_NAME in the environment; flags take precedence.
    """
    settings = read_settings(
        {"catalog": catalog, "host": host, "port": port, "grpc_port": grpc_port, "models": models,
         "log_level": log_level}
    )  # fmt: skip
    if max_replicas is not None and max_replicas < replicas:
        raise typer.BadParameter(f"--max-replicas is below --replicas, which is {replicas}")
    try:
        from service.processes.ray import Placement, serve
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        typer.echo("vitrail: Ray is not installed; pip install 'vitrail[ray]'", err=True)
        raise typer.Exit(2) from error
    placement = Placement(
        replicas=replicas, max_replicas=max(max_replicas or 1, replicas), cpus=cpus, gpus=gpus
    )
    summarize_when_ready(settings)
    with report_errors():
        serve(settings, address, placement)
