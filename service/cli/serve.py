"""`vitrail serve`, `vitrail gateway` and `vitrail worker`."""

from typing import Annotated

import typer

from service.cli.starting import check_port, read_settings, report_errors
from service.cli.summary import summarize_when_ready
from service.settings import Settings

Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(help="REST port.")]
GrpcPort = Annotated[int | None, typer.Option(help="gRPC port.")]
Catalog = Annotated[str | None, typer.Option(help="demo, hub, or a TOML file.")]
Models = Annotated[str | None, typer.Option(help="Models to load at start, comma-separated.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--dtype", help="auto, float32, bfloat16, float16, int8 or fp8."),
]
EngineName = Annotated[str | None, typer.Option(help="Engine of the trunks: auto, eager, ...")]
TransformName = Annotated[
    str | None, typer.Option(help="How images are resized: exact, fast or gpu.")
]
Streams = Annotated[int | None, typer.Option(help="Most batches that run at the same time.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]
TlsCert = Annotated[str | None, typer.Option(help="Certificate (PEM) of HTTP and gRPC.")]
TlsKey = Annotated[str | None, typer.Option(help="The certificate's key (PEM).")]
TlsClientCa = Annotated[str | None, typer.Option(help="CA of the certificates clients need.")]
Processes = Annotated[int, typer.Option(min=1, help="Number of gateways, which share the port.")]
# Under a supervisor: the pipe to write heartbeats to.
Supervised = Annotated[int | None, typer.Option(hidden=True)]


def serve(
    host: Host = None,
    port: Port = None,
    grpc_port: GrpcPort = None,
    catalog: Catalog = None,
    models: Models = None,
    device: Device = None,
    precision: Precision = None,
    engine: EngineName = None,
    transform: TransformName = None,
    streams: Streams = None,
    log_level: LogLevel = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    workers: Annotated[
        str,
        typer.Option(help="Worker processes; auto for one per GPU; 0 for a single process."),
    ] = "0",
    processes: Processes = 1,
) -> None:
    """Serve a catalog over HTTP and gRPC, in one process or with --workers N.

    Every setting can also be set as VITRAIL_NAME in the environment; flags take precedence.
    """
    settings = read_settings(
        {"host": host, "port": port, "grpc_port": grpc_port, "catalog": catalog, "models": models,
         "device": device, "precision": precision, "engine": engine, "transform": transform,
         "streams": streams, "log_level": log_level, "tls_cert": tls_cert, "tls_key": tls_key,
         "tls_client_ca": tls_client_ca}
    )  # fmt: skip
    if workers != "auto" and not workers.isdigit():
        raise typer.BadParameter(f"--workers is {workers!r}; it must be a number or auto")
    with report_errors():
        check_port(settings.host, settings.port, "--port")
        check_port(settings.host, settings.grpc_port, "--grpc-port")
        summarize_when_ready(settings)
        if workers == "0":
            if processes > 1:
                raise typer.BadParameter("more than one of --processes needs --workers")
            serve_embedded(settings)
        else:
            from service.processes.child_settings import find_gpus
            from service.processes.supervisor import supervise

            count = max(1, len(find_gpus())) if workers == "auto" else int(workers)
            raise typer.Exit(supervise(settings, workers=count, processes=processes, grpc=True))


def gateway(
    workers: Annotated[
        str | None,
        typer.Option(help="host:port, dns:///name:port or unix:path; comma-separated."),
    ] = None,
    host: Host = None,
    port: Port = None,
    grpc_port: Annotated[int | None, typer.Option(help="Also serve gRPC, on this port.")] = None,
    log_level: LogLevel = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    worker_ca: Annotated[str | None, typer.Option(help="CA of the workers' certificates.")] = None,
    worker_cert: Annotated[
        str | None, typer.Option(help="Certificate to show to workers (PEM).")
    ] = None,
    worker_key: Annotated[str | None, typer.Option(help="Its key (PEM).")] = None,
    processes: Processes = 1,
    listen_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    supervised: Supervised = None,
) -> None:
    """Serve HTTP in front of workers that run elsewhere. Does not need torch.

    Every setting can also be set as VITRAIL_NAME in the environment; flags take precedence.
    """
    settings = read_settings(
        {"workers": workers, "host": host, "port": port, "grpc_port": grpc_port,
         "log_level": log_level, "tls_cert": tls_cert, "tls_key": tls_key,
         "tls_client_ca": tls_client_ca, "worker_ca": worker_ca, "worker_cert": worker_cert,
         "worker_key": worker_key},
        warns=supervised is None,
    )  # fmt: skip
    if not settings.workers:
        raise typer.BadParameter("no workers; set --workers or VITRAIL_WORKERS")
    if supervised is not None:
        _end_with_parent(settings, supervised)
    with report_errors():
        if processes > 1:
            from service.processes.supervisor import supervise

            grpc = grpc_port is not None
            raise typer.Exit(supervise(settings, workers=0, processes=processes, grpc=grpc))

        import socket

        from service.processes.gateway import serve

        listener = None if listen_fd is None else socket.socket(fileno=listen_fd)
        rpc_address = None if grpc_port is None else settings.rpc_address()
        serve(settings, rpc_address, listener, heartbeat=supervised)


def worker(
    host: Host = None,
    port: GrpcPort = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port for /metrics; 0 to turn it off.")
    ] = None,
    catalog: Catalog = None,
    models: Models = None,
    device: Device = None,
    precision: Precision = None,
    engine: EngineName = None,
    transform: TransformName = None,
    streams: Streams = None,
    log_level: LogLevel = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    address: Annotated[
        str | None, typer.Option(help="unix:path to listen on, instead of host and port.")
    ] = None,
    assigned_gpu: Annotated[bool, typer.Option("--assigned-gpu", hidden=True)] = False,
    supervised: Supervised = None,
) -> None:
    """Serve a catalog over gRPC on one device, for gateways or clients.

    Every setting can also be set as VITRAIL_NAME in the environment; flags take precedence.
    """
    settings = read_settings(
        {"host": host, "grpc_port": port, "metrics_port": metrics_port, "catalog": catalog,
         "models": models, "device": device, "precision": precision, "engine": engine,
         "transform": transform, "streams": streams, "log_level": log_level, "tls_cert": tls_cert,
         "tls_key": tls_key, "tls_client_ca": tls_client_ca},
        warns=supervised is None,
    )  # fmt: skip
    if supervised is not None:
        _end_with_parent(settings, supervised)

    from service.allocator import keep_freed_memory

    keep_freed_memory()
    with report_errors():
        from service.processes.worker import serve
        from service.worker.device_loss import require_gpu

        if assigned_gpu:
            require_gpu()
        serve(settings, address or settings.rpc_address(), heartbeat=supervised)


def serve_embedded(settings: Settings) -> None:
    """Serve in this process until stopped."""
    from service.allocator import keep_freed_memory

    keep_freed_memory()

    from service.processes.embedded import serve

    serve(settings)


def _end_with_parent(settings: Settings, heartbeat: int) -> None:
    from service.processes.parent_watch import end_with_parent

    end_with_parent(settings.stop_timeout_s, heartbeat)
