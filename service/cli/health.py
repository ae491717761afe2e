"""`vitrail health`: a health check for containers."""

from typing import Annotated

import typer

# In gRPC's errors about a server that speaks only HTTP/1.1, without TLS and with it.
NOT_GRPC = ("HTTP/2", "ALPN")


def health(
    address: Annotated[str, typer.Argument(help="host:port or unix:path of a gRPC server.")],
    service: Annotated[str, typer.Option(help="A model's name; empty for the whole server.")] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the response.")] = 4,
) -> None:
    """Check a server's gRPC health. Exits with 0 if it is serving, otherwise with 1.

    With TLS if VITRAIL_WORKER_CA is set (and VITRAIL_WORKER_CERT, VITRAIL_WORKER_KEY).
    """
    import grpc

    from service.rpc.health import check_health
    from service.settings import Settings
    from service.tls import channel_credentials

    try:
        credentials = channel_credentials(Settings())
        serving = check_health(address, service, timeout_s, credentials)
    except grpc.RpcError as error:
        has_status = isinstance(error, grpc.Call)
        said = str((error.details() or error.code().name) if has_status else error)
        if any(sign in said for sign in NOT_GRPC):
            port = Settings.model_fields["grpc_port"].default
            said = f"this port does not speak gRPC; the gRPC port is {port} by default"
        typer.echo(f"{address}: {said}", err=True)
        raise typer.Exit(1) from error
    typer.echo("serving" if serving else "not serving")
    raise typer.Exit(0 if serving else 1)
