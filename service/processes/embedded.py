"""Gateway and worker in one process: the default way to run."""

from fastapi import FastAPI

from service.gateway.app import create_app
from service.gateway.server import run_server
from service.keys import Keys
from service.limits import Budget
from service.open_inference.shared_memory import SharedMemory
from service.processes.ports import check_free
from service.processes.worker import create_backend
from service.rpc.server import RpcServer
from service.settings import Settings
from service.tracing import configure_tracing


def create_embedded_app(settings: Settings) -> FastAPI:
    """The application with a backend in this process, and a gRPC server beside it."""
    keys, budget = Keys(settings), Budget(settings)
    memory = SharedMemory(settings.shared_memory)
    backend, metrics = create_backend(settings)
    rpc = RpcServer(backend, settings, metrics, keys, budget, memory)
    beside = rpc.serving(settings.rpc_address())
    return create_app(settings, backend, metrics, beside, keys, budget, memory, rpc.stop)


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then answer the accepted requests and return."""
    configure_tracing("vitrail")
    app = create_embedded_app(settings)
    check_free(settings.host, settings.grpc_port)
    run_server(app, settings)
