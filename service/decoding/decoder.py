"""The process that decodes images: `python -m service.decoding.decoder`, see `process.py`.

It ends when its worker does, because the worker's end of the channel is closed then. An image that
takes too much processor time ends it by SIGPROF, in the middle of whatever C code is running.
"""

import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from PIL import Image

from models.child import limit_memory
from models.errors import ImageTooLargeError, InputError
from models.inputs.images import ImageLimits, decoding_errors, open_image, to_upright_rgb
from models.inputs.jpeg import jpeg_pixels
from service.decoding.memory import SharedMemory
from service.decoding.messages import CLIP_TIMES, MAX_BYTES, Decoded, Job

# Pillow needs several images at once to composite alpha, and some decoders need buffers of the
# image's size.
BYTES_PER_PIXEL = 24
MARGIN_BYTES = 256 * 2**20
MAX_ERROR_CHARACTERS = 1000


def main() -> None:
    channel_file, memory_file, limits_json, cpu_s = sys.argv[1:]
    limits = ImageLimits(**json.loads(limits_json))
    memory = SharedMemory(limits, int(memory_file))
    channel = socket.socket(fileno=int(channel_file))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker drains first
    limit_memory(MARGIN_BYTES + BYTES_PER_PIXEL * limits.max_pixels)
    with suppress(ConnectionError):  # the worker was killed
        while message := channel.recv(MAX_BYTES):
            job = Job.decode(message)
            times = 1 if job.choice is None else CLIP_TIMES
            signal.setitimer(signal.ITIMER_PROF, times * float(cpu_s))
            data = bytes(memory.view[: job.length])
            for decoded in _decode(data, job, limits, memory.pixels):
                if not decoded.more:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                channel.send(decoded.encode())
                if decoded.more and not channel.recv(MAX_BYTES):
                    return


def _decode(data: bytes, job: Job, limits: ImageLimits, pixels: memoryview) -> Iterator[Decoded]:
    try:
        if job.choice is None:
            yield _decode_into(pixels, data, job, limits)
        else:
            yield from _frames_into(pixels, data, job.choice, limits)
    except InputError as error:
        detail = str(error)[:MAX_ERROR_CHARACTERS]
        yield Decoded(error=detail, too_large=isinstance(error, ImageTooLargeError))
    except MemoryError:
        yield Decoded(error="decoding the image takes too much memory")


def _decode_into(pixels: memoryview, data: bytes, job: Job, limits: ImageLimits) -> Decoded:
    """The same pixels as `decode_image` and `decode_reduced`."""
    header = open_image(data, limits)
    with decoding_errors(header):
        if (jpeg := jpeg_pixels(header, data, job.min_side, pixels)) is not None:
            height, width, _ = jpeg.pixels_HWC.shape
            return Decoded(None, False, width, height, jpeg.transposition, jpeg.factor, *jpeg.size)
        header.load()
        return _put(pixels, to_upright_rgb(header))


def _frames_into(
    pixels: memoryview, data: bytes, choice: tuple[int, int], limits: ImageLimits
) -> Iterator[Decoded]:
    """The same frames as `decode_clip`, one at a time, and a last answer without any."""
    from models.inputs.video import FrameChoice, decode_clip  # loads FFmpeg, for clips alone

    for frame in decode_clip(data, FrameChoice(*choice), limits):
        yield replace(_put(pixels, frame), more=True)
    yield Decoded()


def _put(pixels: memoryview, image: Image.Image) -> Decoded:
    content = image.tobytes("raw", "RGBX")
    pixels[: len(content)] = content
    return Decoded(None, False, *image.size, None, 1, *image.size)


if __name__ == "__main__":
    main()
