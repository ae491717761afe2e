"""Input tensors as the backend's inputs."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from models.inputs.types import Input, Latent, Seed, Video
from service.errors import InvalidInputError, PayloadTooLargeError
from service.limits import Share, check_input_count
from service.payloads import decode_base64
from service.settings import Settings
from service.tensors import DTYPES, check_finite, element_count, from_bytes, unpack

# The data types of preprocessed images and latent vectors; metadata names the first one.
FLOAT_TYPES = ("FP32", "FP16", "BF16")
# The inputs by name, with the data type that metadata names.
KINDS = {
    "image": "BYTES",
    "pixel_values": "FP32",
    "text": "BYTES",
    "video": "BYTES",
    "seed": "INT64",
    "latent": "FP32",
}

# The levels of a request's priority; the lower one comes first.
INTERACTIVE, BULK = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InputTensor:
    """One input tensor of a request."""

    name: str
    datatype: str
    shape: Sequence[int]
    # The contents in the protocol's byte layout, or None if `values` has them.
    raw: bytes | None = None
    # The elements, row by row. Elements of BYTES are bytes, or base64 text.
    values: Sequence[Any] = ()


# Characters of a request's id, which is returned.
MAX_ID = 4096
BMP_HEADER_BYTES = 54
# What is made on the event loop; more is made in a thread.
LOOP_BYTES = 2**18


async def read_inputs(
    tensors: Sequence[InputTensor], settings: Settings, share: Share
) -> list[Input]:
    """The inputs of a request as `to_inputs` makes them, in a thread where there is much to make.

    Args:
        share: counts what is made, before it is made.

    Raises:
        InvalidInputError, PayloadTooLargeError: as `to_inputs`, an image is over a limit, or what
            would be made is.
        UnavailableError: the requests in flight hold too many bytes.
    """
    size = sum(_made_bytes(tensor, settings) for tensor in tensors)
    if not size:
        return to_inputs(tensors, settings)
    share.make(size)
    if size <= LOOP_BYTES:
        return to_inputs(tensors, settings)
    return await share.in_thread(to_inputs, tensors, settings)


def _made_bytes(tensor: InputTensor, settings: Settings) -> int:
    """The bytes of the copies that `to_inputs` makes of a tensor of numbers. It is 0 if it has
    no elements, or its contents do not fit the shape, which `to_inputs` refuses.

    Raises:
        InvalidInputError: the shape is malformed.
        PayloadTooLargeError: an image is over a limit, or there are too many.
    """
    count = element_count(tensor.name, tensor.shape)
    if not count or tensor.datatype == "BYTES" or count != _given(tensor):
        return 0
    check_input_count(settings, tensor.shape[0] if tensor.shape else 1)
    if tensor.name == "image" and tensor.datatype == "UINT8":
        if len(tensor.shape) != 4:
            return count
        images, height, width, _ = tensor.shape
        if (
            max(height, width) > settings.max_image_side
            or height * width > settings.max_image_pixels
        ):
            raise PayloadTooLargeError(
                f"the images have {width}x{height} pixels; the limits are "
                f"{settings.max_image_pixels} pixels and {settings.max_image_side} a side",
                field="image",
            )
        bmp = BMP_HEADER_BYTES + height * (-(-3 * width // 4) * 4)  # rows are of whole words
        if bmp > settings.max_image_bytes:
            raise PayloadTooLargeError(
                f"an image of {width}x{height} pixels takes {bmp} bytes; the limit is "
                f"{settings.max_image_bytes}",
                field="image",
            )
        return images * bmp
    if tensor.datatype not in FLOAT_TYPES or (tensor.datatype == "FP32" and tensor.raw is not None):
        return 0  # refused, seeds, or no copy
    return 4 * count  # float32


def _given(tensor: InputTensor) -> float:
    """The number of elements that the contents of a tensor of numbers hold."""
    if tensor.raw is None:
        return len(tensor.values)
    width = 2 if tensor.datatype == "BF16" else np.dtype(DTYPES.get(tensor.datatype, "u1")).itemsize
    return len(tensor.raw) / width


def to_inputs(tensors: Sequence[InputTensor], settings: Settings) -> list[Input]:
    """The inputs of a request, all of one kind.

    Raises:
        InvalidInputError: wrong name, data type or shape, or contents that do not fit them.
        PayloadTooLargeError: by the shape there are too many.
    """
    if len(tensors) != 1 or tensors[0].name not in KINDS:
        names = ", ".join(repr(tensor.name) for tensor in tensors) or "none"
        kinds = ", ".join(f"{name} ({datatype})" for name, datatype in KINDS.items())
        raise InvalidInputError(
            f"send one input of {kinds}; the request has {names}", field="inputs"
        )
    tensor = tensors[0]
    if not element_count(tensor.name, tensor.shape):
        raise InvalidInputError(f"{tensor.name} has no elements", field=tensor.name)
    check_input_count(settings, tensor.shape[0] if tensor.shape else 1)
    match tensor.name:
        case "image" if tensor.datatype == "UINT8":
            return list(_bytes_of_images(tensor))
        case "image":
            return [_decoded(element) for element in _elements(tensor)]
        case "text":
            return [_text(element) for element in _elements(tensor)]
        case "video":
            return [Video(_decoded(element)) for element in _elements(tensor)]
        case "seed":
            return [Seed(value) for value in _seeds(tensor)]
        case "latent":
            return [Latent(row) for row in _numbers(tensor, "[N, dimensions]", 2)]
    return list(_numbers(tensor, "[N, 3, height, width]", 4))


def timeout_ms(value: Any) -> float | None:
    """The parameter `timeout`, which is in microseconds as in Triton; None if there is none.

    Raises:
        InvalidInputError: not a number.
    """
    if value is None:
        return None
    try:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError
        return value / 1e3
    except (TypeError, OverflowError) as error:
        raise InvalidInputError("timeout is a number of microseconds", field="timeout") from error


def is_bulk(value: Any) -> bool | None:
    """Whether the parameter `priority`, whose levels are Triton's, is that of bulk; None for the
    default level.

    Raises:
        InvalidInputError: no such level.
    """
    if value not in (None, 0, INTERACTIVE, BULK) or isinstance(value, bool | float):
        raise InvalidInputError(
            f"priority is {INTERACTIVE} (interactive), {BULK} (bulk) or 0 for the default",
            field="priority",
        )
    return value == BULK if value else None


def _elements(tensor: InputTensor) -> Sequence[Any]:
    name = tensor.name
    if tensor.datatype != "BYTES":
        raise InvalidInputError(f"{name} is BYTES, not {tensor.datatype}", field=name)
    count = element_count(name, tensor.shape)
    if not 1 <= len(tensor.shape) <= 2 or count != tensor.shape[0]:
        raise InvalidInputError(
            f"{name} has shape [N] or [N, 1], not {list(tensor.shape)}", field=name
        )
    if tensor.raw is not None:
        return unpack(name, tensor.raw, count)
    if len(tensor.values) != count:
        raise InvalidInputError(
            f"{name}: shape {list(tensor.shape)} takes {count} elements, not {len(tensor.values)}",
            field=name,
        )
    return tensor.values


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidInputError("an element of text is not a string", field="text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError("text is not UTF-8", field="text") from error


def _decoded(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return decode_base64(value, "inputs")
    raise InvalidInputError(
        "in JSON, BYTES of images and videos are base64; or use the binary tensor extension",
        field="inputs",
    )


def _bytes_of_images(tensor: InputTensor) -> list[bytes]:
    """Images as UINT8: encoded ones [N, bytes], or RGB pixels [N, height, width, 3]."""
    raw = tensor.raw if tensor.raw is not None else _packed(tensor, "iu", (0, 255))
    array = from_bytes("image", "UINT8", tensor.shape, raw)
    if array.ndim == 2:
        return [row.tobytes() for row in array]
    if array.ndim != 4 or array.shape[3] != 3:
        raise InvalidInputError(
            "image as UINT8 has shape [N, bytes] (encoded) or [N, height, width, 3] (RGB), not "
            f"{list(tensor.shape)}",
            field="image",
        )
    return [_as_bmp(pixels) for pixels in array]


def _as_bmp(pixels: np.ndarray) -> bytes:
    """RGB pixels (H, W, 3) as a BMP file, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def _seeds(tensor: InputTensor) -> list[int]:
    if tensor.datatype != "INT64" or len(tensor.shape) != 1:
        raise InvalidInputError("seed is INT64 of shape [N]", field="seed")
    raw = tensor.raw if tensor.raw is not None else _packed(tensor, "iu")
    seeds: list[int] = from_bytes("seed", tensor.datatype, tensor.shape, raw).tolist()
    if any(seed < 0 for seed in seeds):
        raise InvalidInputError("a seed is not negative", field="seed")
    return seeds


def _numbers(tensor: InputTensor, shape: str, dimensions: int) -> np.ndarray:
    name = tensor.name
    if tensor.datatype not in FLOAT_TYPES:
        raise InvalidInputError(
            f"{name} is {', '.join(FLOAT_TYPES)}, not {tensor.datatype}", field=name
        )
    if len(tensor.shape) != dimensions:
        raise InvalidInputError(f"{name} has shape {shape}, not {list(tensor.shape)}", field=name)
    raw = tensor.raw if tensor.raw is not None else _packed(tensor, "iuf")
    array = from_bytes(name, tensor.datatype, tensor.shape, raw)
    return check_finite(name, array.astype(np.float32, copy=False))


def _packed(tensor: InputTensor, kinds: str, limits: tuple[int, int] | None = None) -> bytes:
    """The values as bytes.

    Args:
        kinds: numpy's letters of the kinds of numbers that the values may be.
        limits: the least and the largest value; None for any.
    """
    name = tensor.name
    if tensor.datatype == "BF16":
        raise InvalidInputError(f"{name}: BF16 must be sent as raw bytes", field=name)
    # numpy would make texts of all of them, each as long as the longest
    if not set(map(type, tensor.values)) <= {int, float}:
        raise InvalidInputError(f"{name}: not numbers of type {tensor.datatype}", field=name)
    array = np.array(tensor.values)
    if array.dtype.kind not in kinds and array.size:
        raise InvalidInputError(f"{name}: not numbers of type {tensor.datatype}", field=name)
    if limits and array.size and not limits[0] <= array.min() <= array.max() <= limits[1]:
        raise InvalidInputError(f"{name}: values are not {tensor.datatype}", field=name)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        return array.astype(DTYPES[tensor.datatype]).tobytes()
