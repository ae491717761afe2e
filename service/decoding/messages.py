"""What a worker and a decoding process send each other, one JSON object a message."""

import json
from dataclasses import asdict, dataclass

MAX_BYTES = 16 * 1024
NEXT = b"next"
# How many times the processor time of an image a clip may take.
CLIP_TIMES = 6


@dataclass(frozen=True, slots=True)
class Job:
    """An encoded image at the start of the shared memory.

    Args:
        length: its bytes.
        min_side: as `decode_reduced` takes it; None for all pixels.
        choice: of a clip, the `frames` and the `sampling_rate` of `FrameChoice`.
    """

    length: int
    min_side: int | None = None
    choice: tuple[int, int] | None = None

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> "Job":
        return cls(**json.loads(message))


@dataclass(frozen=True, slots=True)
class Decoded:
    """The answer to a job: where the pixels are in the shared memory, or an error.

    Args:
        error: what is wrong with the image; the other fields are then meaningless.
        too_large: the error is that the image is over a limit.
        width, height: of the pixels, before they are transposed.
        transposition: of `Image.Transpose`; None for upright pixels.
        factor: by how much the pixels are reduced.
        full_width, full_height: of the whole image, upright.
        more: it is a frame of a clip, and `NEXT` asks for another answer. The last answer to a clip
            has no pixels.
    """

    error: str | None = None
    too_large: bool = False
    width: int = 0
    height: int = 0
    transposition: int | None = None
    factor: int = 1
    full_width: int = 0
    full_height: int = 0
    more: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> "Decoded":
        return cls(**json.loads(message))
