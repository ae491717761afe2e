"""Input tensors as the backend's inputs."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.inputs import Input
from service.errors import InvalidInputError
from service.tensors import DTYPES, element_count, from_bytes, unpack

PIXEL_TYPES = ("FP32", "FP16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputTensor:
    """One input: its contents are `raw` bytes, or `values` (of BYTES: bytes, or base64 text)."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes | None = None
    values: Sequence[Any] = ()


def to_inputs(tensors: Sequence[InputTensor]) -> list[Input]:
    """The encoded images, preprocessed ones as (3, H, W) float32, or texts of a request.

    Raises:
        InvalidInputError: a wrong name, data type or shape, or contents that do not fit them.
    """
    if len(tensors) != 1 or tensors[0].name not in ("image", "pixel_values", "text"):
        names = ", ".join(repr(tensor.name) for tensor in tensors) or "none"
        raise InvalidInputError(
            f"send one input: image (BYTES), pixel_values (FP32) or text (BYTES); came: {names}",
            field="inputs",
        )
    tensor = tensors[0]
    inputs: list[Input]
    match tensor.name:
        case "image":
            inputs = [_decoded(element) for element in _elements(tensor)]
        case "text":
            inputs = [_text(element) for element in _elements(tensor)]
        case _:
            inputs = list(_pixels(tensor))
    if not inputs:
        raise InvalidInputError(f"{tensor.name} holds no image", field=tensor.name)
    return inputs


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
            f"{name}: shape {list(tensor.shape)} takes {count} elements; {len(tensor.values)} came",
            field=name,
        )
    return tensor.values


def _text(value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise InvalidInputError("text is not UTF-8", field="text") from error


def _decoded(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidInputError(
            "image: BYTES in JSON are base64 here; or use the binary tensor extension",
            field="image",
        ) from error


def _pixels(tensor: InputTensor) -> np.ndarray:
    if tensor.datatype not in PIXEL_TYPES:
        raise InvalidInputError(
            f"pixel_values is {', '.join(PIXEL_TYPES)}, not {tensor.datatype}", field="pixel_values"
        )
    if len(tensor.shape) != 4:
        raise InvalidInputError(
            f"pixel_values has shape [N, 3, height, width], not {list(tensor.shape)}",
            field="pixel_values",
        )
    raw = tensor.raw if tensor.raw is not None else _packed(tensor)
    array = from_bytes("pixel_values", tensor.datatype, tensor.shape, raw)
    return array.astype(np.float32, copy=False)


def _packed(tensor: InputTensor) -> bytes:
    if tensor.datatype == "BF16":
        raise InvalidInputError("pixel_values: BF16 comes as raw bytes only", field="pixel_values")
    try:
        return np.array(tensor.values, DTYPES[tensor.datatype]).tobytes()
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidInputError("pixel_values: not numbers", field="pixel_values") from error
