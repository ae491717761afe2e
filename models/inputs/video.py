"""Short clips: MP4, WebM or GIF bytes to the frames that a video trunk takes."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image
from torch import Tensor

from models.errors import ImageTooLargeError, InputError
from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.inputs.transforms import TARGET_FPS, ClipPreprocess, create_transform

# Pixels decoded for one clip: about 20 seconds of 1080p.
MAX_CLIP_PIXELS = 1_200_000_000
# Offset, magic bytes, demuxer. Only these demuxers are used: others of FFmpeg may open files that
# a clip names.
CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (0, b"GIF8", "gif"))

ClipTransform = Callable[[bytes, ImageLimits], Tensor]


def create_clip_transform(spec: ClipPreprocess) -> ClipTransform:
    """Build the transform: an encoded clip to (T, 3, height, width) uint8."""
    transform = create_transform(spec)

    def clip_transform(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        return torch.stack([transform(frame) for frame in decode_clip(data, spec, limits)])

    return clip_transform


def decode_clip(
    data: bytes, spec: ClipPreprocess, limits: ImageLimits = DEFAULT_LIMITS
) -> list[Image.Image]:
    """The frames of a clip that the transform takes, as RGB images.

    Raises:
        ImageTooLargeError: over a limit of bytes, of a frame's size, or too long to decode.
        InputError: not a clip, in a container that is not served, or damaged.
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
    try:
        count, fps, size = _measure(data, name)
        _check(count, size, limits)
        indices = spec.indices(count, fps)
        return _pick(data, name, indices, limits)
    except (FFmpegError, ValueError, OverflowError) as error:
        raise InputError(f"the video cannot be decoded: {error}", field="video") from error


def _measure(data: bytes, name: str) -> tuple[int, float, tuple[int, int]]:
    """Frames, frames a second, and (width, height); read from packets, none of them decoded."""
    with av.open(io.BytesIO(data), "r", format=name) as container:
        stream = _stream(container)
        fps = float(stream.average_rate or stream.guessed_rate or TARGET_FPS)
        size = (stream.codec_context.width, stream.codec_context.height)
        count = sum(packet.size > 0 for packet in container.demux(stream))
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


def _pick(data: bytes, name: str, indices: np.ndarray, limits: ImageLimits) -> list[Image.Image]:
    frames: dict[int, Image.Image] = {}
    last: Any = None
    places, final = set(indices.tolist()), int(indices.max())
    for number, frame in enumerate(_decoded(data, name, limits)):
        last = frame
        if number in places:
            frames[number] = frame.to_image()
        if number >= final:
            break
    if last is None:
        raise InputError("the video has no frame that can be decoded", field="video")
    ending = last.to_image()  # for packets that turned out to hold none
    return [frames.get(place, ending) for place in indices.tolist()]


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
