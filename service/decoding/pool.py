"""Where images are decoded: in processes, in the calling thread, or in either."""

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from PIL import Image

from models.errors import ImageTooLargeError, InputError
from models.inputs.images import (
    ImageLimits,
    ReducedImage,
    check_bytes,
    decode_image,
    decode_reduced,
)
from models.inputs.jpeg_work import pixel_scans
from models.inputs.pixels import image_from
from models.inputs.video import FrameChoice, check_clip, decode_clip
from service.decoding.messages import CLIP_TIMES, Decoded
from service.decoding.process import DecoderDied, DecodingProcess
from service.metrics import Metrics

logger = logging.getLogger(__name__)

# JPEG files of at most as much work are decoded in threads: a third of a second on a slow core.
MAX_THREAD_WORK = 2**25

Frames = Generator[Image.Image, None, None]


class ImageDecoder(Protocol):
    """Decodes encoded images. Methods may be called from any thread."""

    def start(self) -> None:
        """Prepare for the first image."""

    def decoded(self, data: bytes, min_side: int | None) -> AbstractContextManager[Any]:
        """A context with the image as `decode_image` returns it, or `decode_reduced` where there
        is a `min_side`. Its pixels must not be used after the context.

        Raises:
            InputError: it cannot be decoded, or is over a limit.
        """

    def frames(self, data: bytes, choice: FrameChoice) -> Frames:
        """The frames of a clip, as `decode_clip` returns them. The pixels of each must not be used
        after the next one was asked for, or after `close`."""

    def close(self) -> None:
        """Stop decoding."""


class ThreadDecoder:
    """Decodes in the calling thread, where nothing can end a decode that takes too long."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits

    def start(self) -> None:
        pass

    @contextmanager
    def decoded(self, data: bytes, min_side: int | None) -> Iterator[Any]:
        if min_side is None:
            yield decode_image(data, self._limits)
        else:
            yield decode_reduced(data, self._limits, min_side)

    def frames(self, data: bytes, choice: FrameChoice) -> Frames:
        yield from decode_clip(data, choice, self._limits)

    def close(self) -> None:
        pass


class ProcessDecoder:
    """Decodes in processes, of which there are as many as images are decoded at the same time.

    A process that dies or hangs is replaced. If the image took too much processor time, that is the
    image's error; otherwise it is tried once more in a new process. Clips are treated as images.
    """

    def __init__(self, limits: ImageLimits, cpu_s: float, metrics: Metrics) -> None:
        self._limits = limits
        self._cpu_s = cpu_s
        self._metrics = metrics
        self._lock = threading.Lock()
        self._idle: list[DecodingProcess] = []
        self._busy: set[DecodingProcess] = set()
        self._closed = False

    def start(self) -> None:
        self._give_back(self._take())  # the others start when they are needed

    @contextmanager
    def decoded(self, data: bytes, min_side: int | None) -> Iterator[Any]:
        check_bytes(data, self._limits)
        process, decoded = self._decode(data, min_side)
        pixel_bytes = 4 * decoded.width * decoded.height
        try:
            image = _image(process, decoded)
            yield image.image if min_side is None else image
        finally:
            process.memory.trim(len(data), pixel_bytes)
            self._give_back(process)

    def frames(self, data: bytes, choice: FrameChoice) -> Frames:
        check_clip(data, self._limits)
        shown = 0
        for attempt in range(2):
            process = self._take(new=attempt > 0)
            pixel_bytes = 0
            try:
                for number, decoded in enumerate(process.frames(data, choice)):
                    pixel_bytes = max(pixel_bytes, 4 * decoded.width * decoded.height)
                    if decoded.more and number == shown:
                        yield _image(process, decoded).image
                        shown += 1
            except DecoderDied as died:
                self._lose(process, died.reason)
                if died.reason == "time":
                    raise InputError(
                        f"decoding the video takes more than {CLIP_TIMES * self._cpu_s:g} s of "
                        "processor time",
                        field="video",
                    ) from died
                continue
            except BaseException:  # nobody asks for the other frames
                self._discard(process)
                raise
            process.memory.trim(len(data), pixel_bytes)
            self._give_back(process)
            if decoded.error is not None:
                kind = ImageTooLargeError if decoded.too_large else InputError
                raise kind(decoded.error, field="video")
            return
        raise InputError("the video cannot be decoded: it crashes the decoder", field="video")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.stop()

    def pids(self) -> list[int]:
        """The ids of the processes."""
        with self._lock:
            return [process.pid for process in (*self._idle, *self._busy)]

    def _decode(self, data: bytes, min_side: int | None) -> tuple[DecodingProcess, Decoded]:
        for attempt in range(2):
            process = self._take(new=attempt > 0)
            try:
                decoded = process.decode(data, min_side)
            except DecoderDied as died:
                self._lose(process, died.reason)
                if died.reason == "time":
                    raise InputError(
                        f"decoding the image takes more than {self._cpu_s:g} s of processor time"
                    ) from died
                continue
            if decoded.error is not None:
                self._give_back(process)
                raise (ImageTooLargeError if decoded.too_large else InputError)(decoded.error)
            return process, decoded
        raise InputError("the image cannot be decoded: it crashes the decoder")

    def _take(self, *, new: bool = False) -> DecodingProcess:
        with self._lock:
            process = self._idle.pop() if self._idle and not new else None
        if process is None:
            process = DecodingProcess(self._limits, self._cpu_s)
        with self._lock:
            self._busy.add(process)
        return process

    def _give_back(self, process: DecodingProcess) -> None:
        with self._lock:
            self._busy.discard(process)
            if not self._closed:
                self._idle.append(process)
                return
        process.stop()

    def _discard(self, process: DecodingProcess) -> None:
        with self._lock:
            self._busy.discard(process)
        process.stop()

    def _lose(self, process: DecodingProcess, reason: str) -> None:
        with self._lock:
            self._busy.discard(process)
        self._metrics.decoder_deaths.labels(reason).inc()
        logger.warning("a decoder died", extra={"reason": reason, "decoder": process.pid})


class MixedDecoder:
    """Decodes JPEG files whose work is known and small in the calling thread, which costs an
    eighth less, and everything else in processes."""

    def __init__(self, threads: ThreadDecoder, processes: ProcessDecoder) -> None:
        self._threads = threads
        self._processes = processes

    def start(self) -> None:
        self._processes.start()

    def decoded(self, data: bytes, min_side: int | None) -> AbstractContextManager[Any]:
        work = pixel_scans(data)
        if work is not None and work <= MAX_THREAD_WORK:
            return self._threads.decoded(data, min_side)
        return self._processes.decoded(data, min_side)

    def frames(self, data: bytes, choice: FrameChoice) -> Frames:
        return self._processes.frames(data, choice)

    def close(self) -> None:
        self._processes.close()


def create_decoder(where: str, limits: ImageLimits, cpu_s: float, metrics: Metrics) -> ImageDecoder:
    """The decoder of `VITRAIL_DECODERS`.

    Args:
        where: `auto`, `processes` or `threads`.
        cpu_s: as for `ProcessDecoder`.
    """
    threads = ThreadDecoder(limits)
    if where == "threads":
        return threads
    processes = ProcessDecoder(limits, cpu_s, metrics)
    return processes if where == "processes" else MixedDecoder(threads, processes)


def _image(process: DecodingProcess, decoded: Decoded) -> ReducedImage:
    """The decoded image in the shared memory."""
    shape = (decoded.height, decoded.width, 4)
    pixels = np.frombuffer(process.memory.pixels, np.uint8, count=np.prod(shape, dtype=int))
    turned = decoded.transposition
    transposition = None if turned is None else Image.Transpose(turned)
    image = image_from(pixels.reshape(shape), transposition)
    size = decoded.full_width, decoded.full_height
    return ReducedImage(image, size, decoded.factor)
