"""One decoding process, as its worker sees it."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from models.child import child_environment
from models.inputs.images import ImageLimits
from models.inputs.video import FrameChoice
from service.decoding.memory import SharedMemory
from service.decoding.messages import MAX_BYTES, NEXT, Decoded, Job

# A process that owes an answer and has used no processor time for so long hangs, or was stopped.
HUNG_S = 5
# How long a process may take to end when it is no longer needed.
STOP_S = 5


class DecoderDied(Exception):
    """The process died, or was killed because it did not answer.

    Args:
        reason: `time` (of the processor), `hung` or `crash`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DecodingProcess:
    """Starts a process; decodes one image at a time in it."""

    def __init__(self, limits: ImageLimits, cpu_s: float) -> None:
        """
        Args:
            cpu_s: seconds of processor time that an image may take.
        """
        self.memory = SharedMemory(limits)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(1.0)
        files = (theirs.fileno(), self.memory.file)
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "service.decoding.decoder", *map(str, files),
                json.dumps(asdict(limits)), str(cpu_s),
            ],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            process_group=0,  # as the supervisor's children have, see `processes/child.py`
            env=child_environment(),
        )  # fmt: skip
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def decode(self, data: bytes, min_side: int | None) -> Decoded:
        """Decode an image. Its pixels stay in the memory until the next one is decoded.

        Raises:
            DecoderDied: the process is dead.
        """
        self.memory.view[: len(data)] = data
        return self._ask(Job(len(data), min_side).encode())

    def frames(self, data: bytes, choice: FrameChoice) -> Iterator[Decoded]:
        """Decode a clip. The pixels of each frame stay in the memory until the next one is asked
        for. The last answer has none, and perhaps an error.

        Raises:
            DecoderDied: the process is dead.
        """
        self.memory.view[: len(data)] = data
        job = Job(len(data), choice=(choice.frames, choice.sampling_rate))
        decoded = self._ask(job.encode())
        while decoded.more:
            yield decoded
            decoded = self._ask(NEXT)
        yield decoded

    def stop(self) -> None:
        """Let the process end, or kill it."""
        self._close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, question: bytes) -> Decoded:
        try:
            self._channel.send(question)
            answer = self._receive()
        except OSError as error:
            raise self._died() from error
        if not answer:
            raise self._died()
        return Decoded.decode(answer)

    def _receive(self) -> bytes:
        idle_s, used = 0, -1
        while True:
            try:
                return self._channel.recv(MAX_BYTES)
            except TimeoutError as error:
                before, used = used, self._cpu_ticks()
                idle_s = idle_s + 1 if used == before else 0
                if idle_s >= HUNG_S:
                    self._process.kill()
                    self._died()
                    raise DecoderDied("hung") from error

    def _cpu_ticks(self) -> int:
        """The processor time of the process, in the kernel's ticks."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return -1
        return int(fields[11]) + int(fields[12])

    def _died(self) -> DecoderDied:
        self._process.wait()
        self._close()
        is_over_time = self._process.returncode == -signal.SIGPROF
        return DecoderDied("time" if is_over_time else "crash")

    def _close(self) -> None:
        self._channel.close()
        self.memory.close()
