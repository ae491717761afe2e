"""`vitrail serve`."""

import sys
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.settings import Settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="REST port.")] = None,
    catalog: Annotated[str | None, typer.Option(help="demo, hub, or a TOML file.")] = None,
    models: Annotated[str | None, typer.Option(help="Models to load, comma-separated.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    streams: Annotated[int | None, typer.Option(help="Batches in flight.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.")] = None,
) -> None:
    """Serve a catalog over HTTP: gateway and worker in one process.

    Every setting can also come from the environment as VITRAIL_NAME; flags win.
    """
    flags: dict[str, Any] = {k: v for k, v in locals().items() if v is not None}
    try:
        settings = Settings(**flags)
    except ValidationError as error:
        for item in error.errors():
            typer.echo(f"{'.'.join(map(str, item['loc']))}: {item['msg']}", err=True)
        raise typer.Exit(2) from error

    from service.allocator import keep_freed_memory
    from service.logs import configure_logs

    keep_freed_memory()
    configure_logs(settings.log_level)

    from models.errors import ModelsError
    from service.embedded import serve as serve_embedded

    try:
        serve_embedded(settings)
    except ModelsError as error:
        typer.echo(f"vitrail: {error}", err=True)
        sys.exit(2)
