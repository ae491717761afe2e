"""Requests and responses of the Open Inference Protocol over HTTP: JSON, then binary tensors.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import base64
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from fastapi import Response
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.datastructures import Headers

from service.errors import BadRequestError, InvalidInputError, PayloadTooLargeError
from service.limits import MAX_ANSWER_VALUES, Share
from service.open_inference.inputs import MAX_ID, InputTensor, is_bulk, timeout_ms
from service.open_inference.metadata import VERSION
from service.open_inference.outputs import MAX_OUTPUTS, RequestedOutput
from service.open_inference.shared_memory import Place, place_of
from service.parameters import validate
from service.payloads import parse_json_object
from service.tensors import MAX_DIMENSIONS, datatype_of, pack, to_bytes

HEADER_LENGTH = "inference-header-content-length"
# So many integers of one byte, such as a mask's, count as one number in JSON: they are short there.
SMALL = 8
JSON_PIECE = 2**16  # elements that are written at a time
_LENGTH = re.compile("[0-9]{1,18}")

Parameters = dict[str, Any]
Read = Callable[[Place], Awaitable[bytes]]


class _Input(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(max_length=MAX_DIMENSIONS)
    parameters: Parameters = {}
    data: list[Any] | None = None


class _Output(BaseModel):
    name: str
    parameters: Parameters = {}


class _InferRequest(BaseModel):
    id: str = Field("", max_length=MAX_ID)
    parameters: Parameters = {}
    inputs: list[_Input] = Field(max_length=16)
    outputs: list[_Output] = Field([], max_length=MAX_OUTPUTS)


class _IndexRequest(BaseModel):
    ready: bool = False


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A parsed request.

    Args:
        options: the task's, by the names of the REST parameters.
        timeout_ms: None if the body has none.
        bulk: as `is_bulk` says.
        binary: whether outputs are binary by default.
    """

    id: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]
    # The task's options, by the names of the REST parameters.
    options: Mapping[str, Any]
    timeout_ms: float | None
    bulk: bool | None
    # Whether outputs are binary unless they say otherwise.
    binary: bool


async def parse_infer_request(
    headers: Headers, content: bytes, read: Read, share: Share
) -> InferenceRequest:
    """Parse a body. A header length of 0 means that the whole body is one encoded image.

    Args:
        read: reads an input from shared memory.
        share: of the request.

    Raises:
        ServiceError: not JSON, not the protocol's form, or with binary parts of a wrong size.
    """
    header = headers.get(HEADER_LENGTH)
    if header is not None and (not _LENGTH.fullmatch(header) or int(header) > len(content)):
        raise BadRequestError(
            f"Inference-Header-Content-Length is {header!r}; the body has {len(content)} bytes"
        )
    length = len(content) if header is None else int(header)
    if header is not None and length == 0:
        image = InputTensor(name="image", datatype="BYTES", shape=[1], raw=pack([content]))
        return InferenceRequest("", [image], [], {}, None, None, binary=False)
    parsed = validate(_InferRequest, await parse_json_object(content[:length], share))
    options = dict(parsed.parameters)
    binary = options.pop("binary_data_output", False)
    timeout = timeout_ms(options.pop("timeout", None))
    bulk = is_bulk(options.pop("priority", None))
    if not isinstance(binary, bool):
        raise InvalidInputError("binary_data_output is a boolean", field="binary_data_output")
    return InferenceRequest(
        parsed.id,
        await _inputs(parsed.inputs, memoryview(content)[length:], read),
        [_requested(output) for output in parsed.outputs],
        options,
        timeout,
        bulk,
        binary,
    )


async def parse_index_request(content: bytes, share: Share) -> bool:
    """Whether the repository index is limited to ready models. The body may be empty."""
    return validate(_IndexRequest, await parse_json_object(content or b"{}", share)).ready


def write_infer_response(
    model: str,
    request: InferenceRequest,
    outputs: Sequence[RequestedOutput],
    arrays: Sequence[np.ndarray],
    placed: list[tuple[Place, bytes]],
) -> Response:
    """The response: JSON, followed by the outputs that were requested as binary.

    Args:
        placed: gets the outputs that belong into shared memory.

    Raises:
        PayloadTooLargeError: too many numbers would be JSON.
    """
    _check_json_size(
        [
            array
            for output, array in zip(outputs, arrays, strict=True)
            if output.place is None and not _is_binary(output, request)
        ]
    )
    answer = {"model_name": model, "model_version": VERSION}
    if request.id:
        answer["id"] = request.id
    text = [to_json(answer)[:-1], b',"outputs":[']
    binary: list[bytes] = []
    for position, (output, array) in enumerate(zip(outputs, arrays, strict=True)):
        text.append(b"," if position else b"")
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if output.place is not None:
            content = to_bytes(array)
            placed.append((output.place, content))
            entry["parameters"] = {
                "shared_memory_region": output.place.region,
                "shared_memory_offset": output.place.offset,
                "shared_memory_byte_size": len(content),
            }
        elif _is_binary(output, request):
            binary.append(to_bytes(array))
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            text += [to_json(entry)[:-1], b',"data":[', *_json_elements(array), b"]}"]
            continue
        text.append(to_json(entry))
    head = b"".join([*text, b"]}"])
    if not binary:
        return Response(head, media_type="application/json")
    return Response(
        b"".join([head, *binary]),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(head))},
    )


def _check_json_size(arrays: Sequence[np.ndarray]) -> None:
    small = sum(array.size for array in arrays if array.dtype in (np.uint8, np.int8))
    values = sum(array.size for array in arrays)
    if values - small + small / SMALL > MAX_ANSWER_VALUES:
        raise PayloadTooLargeError(
            f"{values} numbers as JSON; the limit is {MAX_ANSWER_VALUES}, of UINT8 and INT8 "
            f"{SMALL * MAX_ANSWER_VALUES}. Request the outputs with binary_data"
        )


def _json_elements(array: np.ndarray) -> Iterator[bytes]:
    """An array's elements as JSON, in pieces: a thread lets others run between them."""
    flat = array.ravel()
    for start in range(0, flat.size, JSON_PIECE):
        elements = [_plain(element) for element in flat[start : start + JSON_PIECE].tolist()]
        yield (b"," if start else b"") + to_json(elements)[1:-1]


def _is_binary(output: RequestedOutput, request: InferenceRequest) -> bool:
    return request.binary if output.binary is None else output.binary


async def _inputs(inputs: Sequence[_Input], binary: memoryview, read: Read) -> list[InputTensor]:
    tensors, position = [], 0
    for item in inputs:
        raw = None
        size = item.parameters.get("binary_data_size")
        if size is not None:
            if not isinstance(size, int) or not 0 <= size <= len(binary) - position:
                raise InvalidInputError(
                    f"{item.name}: binary_data_size is {size!r}; "
                    f"the body has {len(binary) - position} bytes left",
                    field="inputs",
                )
            raw = bytes(binary[position : position + size])
            position += size
        elif (place := place_of(item.parameters)) is not None:
            raw = await read(place)
        elif item.data is None:
            raise InvalidInputError(f"{item.name} has neither data nor binary_data_size")
        values = _flat(item.data or [])
        tensors.append(
            InputTensor(
                name=item.name, datatype=item.datatype, shape=item.shape, raw=raw, values=values
            )
        )
    if position != len(binary):
        raise InvalidInputError(
            f"{len(binary) - position} bytes after the last binary input", field="inputs"
        )
    return tensors


def _requested(output: _Output) -> RequestedOutput:
    count = output.parameters.get("classification", 0)
    binary = output.parameters.get("binary_data")
    if not isinstance(count, int) or not isinstance(binary, bool | None):
        raise InvalidInputError(
            "classification is a number, binary_data a boolean", field="outputs"
        )
    return RequestedOutput(
        output.name, classification=count, binary=binary, place=place_of(output.parameters)
    )


def _flat(values: list[Any]) -> list[Any]:
    """Data as a flat list; it may be nested by the tensor's shape."""
    while values and isinstance(values[0], list):
        if not all(isinstance(inner, list) for inner in values):
            raise InvalidInputError("data is nested unevenly", field="inputs")
        values = list(chain.from_iterable(values))
    return values


def _plain(element: Any) -> Any:
    """An element as JSON has it: files as base64, all others unchanged."""
    return base64.b64encode(element).decode() if isinstance(element, bytes) else element
