"""Short clips: MP4, WebM or GIF bytes to the frames that a video trunk takes. Needs no torch."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from models.errors import ImageTooLargeError, InputError
from models.inputs.images import DEFAULT_LIMITS, ImageLimits

TARGET_FPS = 30
# Pixels decoded for one clip: about 20 seconds of 1080p.
MAX_CLIP_PIXELS = 1_200_000_000
# Frames of one clip: small ones take longer than their pixels.
MAX_CLIP_FRAMES = 20_000
# Offset, magic bytes, demuxer. Only these demuxers are used: others of FFmpeg may open files that
# a clip names.
CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (0, b"GIF8", "gif"))


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which frames a trunk takes: `frames` from a window around the middle, of which every
    `sampling_rate`th of 30 a second is taken (SlowFast's, with a single view)."""

    frames: int
    sampling_rate: int

    def indices(self, count: int, fps: float) -> np.ndarray:
        """Which of `count` frames, (frames,) int64, in order; of shorter clips the last one stands
        in."""
        window = self.frames * self.sampling_rate * fps / TARGET_FPS
        start = max(0.0, (count - window) / 2)
        chosen = np.linspace(start, start + window - 1, self.frames)
        return np.clip(chosen, 0, count - 1).astype(np.int64)


def decode_clip(
    data: bytes, choice: FrameChoice, limits: ImageLimits = DEFAULT_LIMITS
) -> Iterator[Image.Image]:
    """The chosen frames of a clip, as RGB images, one at a time.

    Raises:
        ImageTooLargeError: over a limit of bytes, of a frame's size, or too long to decode.
        InputError: not a clip, in a container that is not served, or damaged.
    """
    name = check_clip(data, limits)
    try:
        count, fps, size = _measure(data, name)
        _check(count, size, limits)
        yield from _pick(data, name, choice.indices(count, fps).tolist(), limits)
    except (FFmpegError, ValueError, OverflowError) as error:
        raise InputError(f"the video cannot be decoded: {error}", field="video") from error


def check_clip(data: bytes, limits: ImageLimits) -> str:
    """The name of a clip's container, by its first bytes.

    Raises:
        ImageTooLargeError, InputError: over the limit of bytes, empty, or not a clip.
    """
    if not data:
        raise InputError("the video is empty (0 bytes)", field="video")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(
            f"the video has {len(data)} bytes; the limit is {limits.max_bytes}", field="video"
        )
    name = next((n for at, magic, n in CONTAINERS if data[at:].startswith(magic)), None)
    if name is None:
        raise InputError("not a video in a served container (MP4, WebM, GIF)", field="video")
    return name


def _measure(data: bytes, name: str) -> tuple[int, float, tuple[int, int]]:
    """Frames, frames a second, and (width, height); read from packets, none of them decoded."""
    with av.open(io.BytesIO(data), "r", format=name) as container:
        stream = _stream(container)
        fps = float(stream.average_rate or stream.guessed_rate or TARGET_FPS)
        size = (stream.codec_context.width, stream.codec_context.height)
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > MAX_CLIP_FRAMES:
                raise _too_long(f"more than {MAX_CLIP_FRAMES} frames")
    if count == 0:
        raise InputError("the video has no frames", field="video")
    return count, fps, size


def _check(count: int, size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise ImageTooLargeError(
            f"the video's frames have {width} x {height} pixels; the limits are "
            f"{limits.max_pixels} pixels and {limits.max_side} a side",
            field="video",
        )
    if count * width * height > MAX_CLIP_PIXELS:
        raise _too_long(f"{count} frames of {width} x {height} pixels")


def _too_long(what: str) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"the video has {what}, more than can be decoded in time; send a shorter or a smaller one",
        field="video",
    )


def _pick(data: bytes, name: str, places: list[int], limits: ImageLimits) -> Iterator[Image.Image]:
    """The frames at these places, which are in order."""
    left = iter(places)
    place = next(left, None)
    last: Any = None
    for number, frame in enumerate(_decoded(data, name, limits)):
        last = frame
        while place == number:
            yield frame.to_image()
            place = next(left, None)
        if place is None:
            return
    if last is None:
        raise InputError("the video has no frame that can be decoded", field="video")
    while place is not None:  # for packets that turned out to hold none
        yield last.to_image()
        place = next(left, None)


def _decoded(data: bytes, name: str, limits: ImageLimits) -> Iterator[Any]:
    with av.open(io.BytesIO(data), "r", format=name) as container:
        stream = _stream(container)
        stream.codec_context.thread_count = 1  # clips are spread over threads already
        # frames may turn out larger than the container says
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        pixels = 0
        for frame in container.decode(stream):
            pixels += frame.width * frame.height
            if pixels > MAX_CLIP_PIXELS:
                raise _too_long("frames that are larger than it says")
            yield frame


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise InputError("the file holds no video", field="video")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise InputError("the video's codec is not known", field="video")
    return stream
