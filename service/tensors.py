"""Converts numpy arrays to the Open Inference Protocol's data types and bytes, and back.

Each element of BYTES is preceded by its length, as 4 bytes little-endian. All other types are
little-endian, row by row. numpy has no BF16, so it is read as float32.
"""

import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np

from service.errors import InvalidInputError

DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
# Whatever the sizes, numpy can make an array of such a shape, or says that the contents do not fit.
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**40
_DATATYPES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def datatype_of(array: np.ndarray) -> str:
    """The protocol's name for an array's type; strings and objects are BYTES."""
    return "BYTES" if array.dtype.kind in "USO" else _DATATYPES[array.dtype.newbyteorder("<")]


def to_bytes(array: np.ndarray) -> bytes:
    """An array's contents, in the protocol's layout."""
    if datatype_of(array) == "BYTES":
        return pack(_as_bytes(element) for element in array.ravel().tolist())
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def from_bytes(name: str, datatype: str, shape: Sequence[int], contents: bytes) -> np.ndarray:
    """The array that `contents` hold, read-only unless it was converted. BYTES become text.

    Raises:
        InvalidInputError: unknown data type, negative shape, or contents of the wrong size.
    """
    count = element_count(name, shape)
    if datatype == "BYTES":
        texts = [element.decode(errors="replace") for element in unpack(name, contents, count)]
        return np.array(texts, dtype=object).reshape(shape)
    width = 2 if datatype == "BF16" else np.dtype(_dtype(name, datatype)).itemsize
    if len(contents) != count * width:
        raise InvalidInputError(
            f"{name}: {datatype} of shape {list(shape)} takes {count * width} bytes, "
            f"not {len(contents)}",
            field=name,
        )
    if datatype == "BF16":
        halves = np.frombuffer(contents, "<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(shape)
    return np.frombuffer(contents, _dtype(name, datatype)).reshape(shape)


def element_count(name: str, shape: Sequence[int]) -> int:
    """The number of elements of a tensor.

    Raises:
        InvalidInputError: too many dimensions, or a size that is negative or too large.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidInputError(
            f"{name}: {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}", field=name
        )
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InvalidInputError(
            f"{name}: shape {list(shape)} has a size that is negative or too large", field=name
        )
    return math.prod(shape)


def check_finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array.

    Raises:
        InvalidInputError: a value is not finite.
    """
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{name} has values that are not finite", field=name)
    return array


def pack(elements: Iterable[bytes]) -> bytes:
    """BYTES elements, concatenated, each preceded by its length."""
    return b"".join(part for item in elements for part in (struct.pack("<I", len(item)), item))


def unpack(name: str, contents: bytes, count: int) -> list[bytes]:
    """The `count` BYTES elements that `contents` hold.

    Raises:
        InvalidInputError: the lengths do not add up, or the number of elements is wrong.
    """
    elements: list[bytes] = []
    position = 0
    while position + 4 <= len(contents) and len(elements) <= count:
        (size,) = struct.unpack_from("<I", contents, position)
        elements.append(contents[position + 4 : position + 4 + size])
        position += 4 + size
    if position != len(contents) or len(elements) != count:
        raise InvalidInputError(
            f"{name}: the {len(contents)} bytes are not {count} elements, each preceded by its "
            "length as 4 bytes, little-endian",
            field=name,
        )
    return elements


def _as_bytes(element: str | bytes) -> bytes:
    return element.encode() if isinstance(element, str) else element


def _dtype(name: str, datatype: str) -> str:
    if datatype not in DTYPES:
        raise InvalidInputError(f"{name}: unknown data type {datatype!r}", field=name)
    return DTYPES[datatype]
