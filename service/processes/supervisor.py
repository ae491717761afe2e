"""Starts gateways and local workers, restarts them with back-off, and stops them in order."""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

from service.exit_status import MISCONFIGURED
from service.processes.child import Child
from service.processes.child_settings import (
    assigned_gpus,
    child_environment,
    with_worker_token,
    worker_settings,
)
from service.processes.ports import check_free
from service.processes.run_folder import run_folder
from service.settings import Settings

logger = logging.getLogger(__name__)

# Between two workers of a rolling restart, so that every gateway reaches the first one again.
PAUSE_S = 2.0
WORKER_GRACE_S = 10.0


def supervise(settings: Settings, *, workers: int, processes: int, grpc: bool) -> int:
    """Run until stopped by a signal.

    SIGTERM and SIGINT stop the gateways once they have answered the accepted requests, then the
    workers. A second signal kills them all. SIGUSR1 restarts the workers one by one.

    Args:
        workers: the number of local workers, in addition to those that the settings name.
        processes: the number of gateways, which share the REST port.
        grpc: whether the gateways also serve gRPC.

    Returns:
        The exit status.

    Raises:
        OSError: a port is taken.
    """
    if grpc:
        check_free(settings.host, settings.grpc_port)  # gateways share it, so theirs cannot tell
    with (
        run_folder() as (folder, lock),
        socket.create_server(
            (settings.host, settings.port),
            family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
            backlog=2048,
        ) as listener,
    ):
        supervisor = _Supervisor(settings, folder, lock, listener, workers, processes, grpc)
        return asyncio.run(supervisor.run())


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        folder: Path,
        lock: int,
        listener: socket.socket,
        workers: int,
        processes: int,
        grpc: bool,
    ) -> None:
        settings = with_worker_token(settings)
        self._settings = settings
        metrics = folder / "metrics"
        metrics.mkdir()
        shared = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        sockets = [f"unix:{folder}/worker-{i}.sock" for i in range(workers)]
        # The workers' standard input. It ends when this process and all gateways have, because
        # gateways that drain need workers.
        workers_stdin, held_by_gateways = os.pipe()
        self._workers = [
            Child(
                f"worker-{i}",
                ["worker", "--address", address, *([] if gpu is None else ["--assigned-gpu"])],
                child_environment(worker_settings(settings, workers, gpu))
                | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
                | shared,
                metrics=metrics,
                files=(lock,),
                stdin=workers_stdin,
                health_address=address,
            )
            for i, (address, gpu) in enumerate(
                zip(sockets, assigned_gpus(settings, workers), strict=True)
            )
        ]
        addresses = ",".join([*settings.workers, *sockets])
        environment = child_environment(settings) | {"VITRAIL_WORKERS": addresses} | shared
        listen = ["--listen-fd", str(listener.fileno())]
        rpc = ["--grpc-port", str(settings.grpc_port)] if grpc else []
        self._gateways = [
            Child(
                f"gateway-{i}",
                ["gateway", *listen, *rpc],
                environment,
                metrics=metrics,
                files=(listener.fileno(), held_by_gateways, lock),
            )
            for i in range(processes)
        ]
        self._stop = asyncio.Event()
        self._restart = asyncio.Event()
        self._status = 0
        host, port = listener.getsockname()[:2]
        logger.info("%d workers, %d gateways on %s:%d", workers, processes, host, port)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGUSR1, self._restart.set)
        children = [*self._workers, *self._gateways]
        keepers = [asyncio.create_task(self._keep(child)) for child in children]
        rolling = asyncio.create_task(self._roll())
        await self._stop.wait()
        rolling.cancel()
        drain_s = self._settings.stop_timeout_s
        await asyncio.gather(
            *(gateway.stop(drain_s + WORKER_GRACE_S) for gateway in self._gateways)
        )
        await asyncio.gather(*(worker.stop(WORKER_GRACE_S) for worker in self._workers))
        await asyncio.gather(*keepers)
        return self._status

    async def _keep(self, child: Child) -> None:
        """Keep a child running. If it cannot start with its settings, stop everything."""
        if await child.keep() == MISCONFIGURED:
            self._status = MISCONFIGURED
            self._stop.set()

    async def _roll(self) -> None:
        while True:
            await self._restart.wait()
            self._restart.clear()
            for worker in self._workers:
                logger.info("restarting %s", worker.name)
                await worker.restart(self._settings.drain_timeout_s + WORKER_GRACE_S)
                await worker.wait_ready()
                await asyncio.sleep(PAUSE_S)
            logger.info("all workers have been restarted")

    def _on_stop(self) -> None:
        if self._stop.is_set():
            for child in (*self._gateways, *self._workers):
                child.kill()
        self._stop.set()
