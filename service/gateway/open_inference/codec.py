"""Requests and responses of the Open Inference Protocol over HTTP: JSON, then binary tensors.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request, Response
from pydantic import BaseModel, Field

from service.errors import BadRequestError, InvalidInputError
from service.open_inference.inputs import InputTensor
from service.open_inference.metadata import VERSION
from service.open_inference.outputs import RequestedOutput
from service.parameters import validate
from service.tensors import datatype_of, pack, to_bytes

HEADER_LENGTH = "inference-header-content-length"

Parameters = dict[str, Any]


class _Input(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: list[Any] | None = None


class _Output(BaseModel):
    name: str
    parameters: Parameters = {}


class _InferRequest(BaseModel):
    id: str = ""
    parameters: Parameters = {}
    inputs: list[_Input] = Field(max_length=16)
    outputs: list[_Output] = Field([], max_length=64)


class _IndexRequest(BaseModel):
    ready: bool = False


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A parsed request."""

    id: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]
    # The task's options, by the names of the REST parameters.
    options: Mapping[str, Any]
    timeout_ms: float | None
    # Whether outputs are binary unless they say otherwise.
    binary: bool


def read_infer_request(request: Request, content: bytes) -> InferenceRequest:
    """Parse a body. If the header length is 0, the whole body is one encoded image.

    Raises:
        ServiceError: not JSON, not the protocol's form, or binary parts of the wrong size.
    """
    header = request.headers.get(HEADER_LENGTH)
    if header is not None and (not header.isdigit() or int(header) > len(content)):
        raise BadRequestError(
            f"Inference-Header-Content-Length is {header!r}; the body has {len(content)} bytes"
        )
    length = len(content) if header is None else int(header)
    if header is not None and length == 0:
        image = InputTensor(name="image", datatype="BYTES", shape=[1], raw=pack([content]))
        return InferenceRequest("", [image], [], {}, None, binary=False)
    parsed = validate(_InferRequest, _json_object(content[:length]))
    options = dict(parsed.parameters)
    binary = options.pop("binary_data_output", False)
    timeout_us = options.pop("timeout", None)  # Triton's unit is microseconds
    if not isinstance(binary, bool) or not isinstance(timeout_us, int | float | None):
        raise InvalidInputError("binary_data_output is a boolean, timeout a number of microseconds")
    return InferenceRequest(
        parsed.id,
        _inputs(parsed.inputs, memoryview(content)[length:]),
        [_requested(output) for output in parsed.outputs],
        options,
        None if timeout_us is None else timeout_us / 1e3,
        binary,
    )


def read_index_request(content: bytes) -> bool:
    """Whether a repository index lists ready models only. The body may be empty."""
    return validate(_IndexRequest, _json_object(content or b"{}")).ready


def write_infer_response(
    model: str,
    request: InferenceRequest,
    outputs: Sequence[RequestedOutput],
    arrays: Sequence[np.ndarray],
) -> Response:
    """The response. Binary outputs follow the JSON, in order."""
    entries: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output, array in zip(outputs, arrays, strict=True):
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if request.binary if output.binary is None else output.binary:
            binary.append(to_bytes(array))
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = [_plain(element) for element in array.ravel().tolist()]
        entries.append(entry)
    response = {"model_name": model, "model_version": VERSION, "outputs": entries}
    if request.id:
        response["id"] = request.id
    head = json.dumps(response, separators=(",", ":"), allow_nan=False).encode()
    if not binary:
        return Response(head, media_type="application/json")
    return Response(
        b"".join([head, *binary]),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(head))},
    )


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the JSON body must be an object")
    return fields


def _inputs(inputs: Sequence[_Input], binary: memoryview) -> list[InputTensor]:
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
    return RequestedOutput(output.name, classification=count, binary=binary)


def _flat(values: list[Any]) -> list[Any]:
    """The elements in one list. Data may be nested by the tensor's shape, or flat."""
    while values and isinstance(values[0], list):
        try:
            values = [inner for outer in values for inner in outer]
        except TypeError as error:
            raise InvalidInputError("data is nested unevenly", field="inputs") from error
    return values


def _plain(element: Any) -> Any:
    """An element in JSON. Files, which are bytes, are base64."""
    return base64.b64encode(element).decode() if isinstance(element, bytes) else element
