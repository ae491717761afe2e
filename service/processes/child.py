"""One process that the supervisor keeps running."""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
from prometheus_client.multiprocess import mark_process_dead

from service.exit_status import DEVICE_LOST, MISCONFIGURED
from service.processes.heartbeat import Watch
from service.rpc.health import check_health

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
# After running for this long, a child starts with the first back-off again.
STABLE_S = 60.0


class Child:
    """A `vitrail` command that is kept running until it is stopped.

    It is restarted, with back-off, after it exits and after its heartbeats end (`heartbeat.py`).
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        metrics: Path,
        files: Sequence[int] = (),
        stdin: int = asyncio.subprocess.PIPE,
        health_address: str = "",
    ) -> None:
        """
        Args:
            metrics: the folder of PROMETHEUS_MULTIPROC_DIR.
            files: file descriptors that the process inherits.
            stdin: the end of a pipe, at whose end the process stops (`parent_watch.py`): by default
                one that ends with this process.
            health_address: where its gRPC health service listens.
        """
        self.name = name
        self._arguments = arguments
        self._environment = environment
        self._metrics = metrics
        self._files = files
        self._stdin = stdin
        self._health_address = health_address
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._restarting = False
        self._has_started = False
        self._exited = asyncio.Event()

    async def keep(self) -> int:
        """Run the command until stopped, or until it turns out to be misconfigured.

        Returns:
            The last exit status.
        """
        backoff_s = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            status = await self._run_once()
            lived_s = time.monotonic() - started
            if self._stopping.is_set():
                return status
            # One that has started before may start again, once its files are mended.
            if status == MISCONFIGURED and not self._has_started:
                return status
            if self._restarting:
                self._restarting = False
                continue
            backoff_s = FIRST_BACKOFF_S if lived_s > STABLE_S else backoff_s
            logger.error(
                "%s exited with status %d after %.1f s; restarting in %.1f s",
                self.name, status, lived_s, backoff_s,
            )  # fmt: skip
            if await self._stopped_within(backoff_s):
                return status
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def stop(self, grace_s: float) -> None:
        """End the process: SIGTERM, and after `grace_s` seconds SIGKILL."""
        self._stopping.set()
        await self._end(grace_s)

    async def restart(self, grace_s: float) -> None:
        """Restart the process, without back-off."""
        self._restarting = self._process is not None
        await self._end(grace_s)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    async def wait_ready(self) -> None:
        """Wait until the child's gRPC health is SERVING, or it is stopped."""
        while not await self._is_serving():
            if await self._stopped_within(0.2):
                return

    async def _run_once(self) -> int:
        self._exited.clear()
        watch = Watch()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service.cli", *self._arguments,
            "--supervised", str(watch.write),
            env=self._environment,
            stdin=self._stdin,
            pass_fds=(*self._files, watch.write),
            # So that Ctrl-C reaches only the supervisor.
            process_group=0,
        )  # fmt: skip
        watch.close_write()
        self._process = process
        watching = asyncio.create_task(self._kill_if_silent(watch))
        logger.info("%s started", self.name, extra={"pid": process.pid})
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        try:
            return await process.wait()
        finally:
            self._process = None
            # A worker that had a device has shown that its settings are right.
            is_lost = process.returncode == DEVICE_LOST
            self._has_started = self._has_started or is_lost or watch.has_beaten
            watching.cancel()
            watch.close()
            self._exited.set()
            mark_process_dead(process.pid, str(self._metrics))  # type: ignore[no-untyped-call]

    async def _kill_if_silent(self, watch: Watch) -> None:
        silent_s = await watch.silence()
        if not self._stopping.is_set() and not self._restarting:
            logger.error(
                "%s has not shown itself alive for %.1f s; killing it", self.name, silent_s
            )
            self.kill()

    async def _end(self, grace_s: float) -> None:
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self._exited.wait()
        except TimeoutError:
            logger.error("%s did not exit within %.0f s; killing it", self.name, grace_s)
            self.kill()
            await self._exited.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def _is_serving(self) -> bool:
        try:
            return await asyncio.to_thread(check_health, self._health_address)
        except grpc.RpcError:
            return False
