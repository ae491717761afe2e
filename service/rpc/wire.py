"""Conversions between the values of `service.types` and the messages of `vision.proto`.

`to_` functions return messages, `from_` functions read them.
"""

import json
import string
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from models.description import HeadDescription
from models.inputs.types import Input, Latent, Seed, Video
from models.tasks.table import tasks
from service.errors import (
    BY_SLUG,
    MAX_DETAIL,
    FieldError,
    InternalError,
    InvalidInputError,
    ServiceError,
    cut,
)
from service.parameters import validated_call
from service.stubs import vision_pb2 as pb
from service.tensors import check_finite, datatype_of, element_count, from_bytes, to_bytes
from service.types import (
    Call,
    ImageResult,
    InferRequest,
    InferResult,
    ModelUsed,
    Timing,
)

Output = Mapping[str, np.ndarray] | ServiceError
# Of the 8 KiB of a trailer: the status' text in percent-encoding, and the error before base64.
MAX_TEXT_BYTES = 2000
MAX_ERROR_BYTES = 4000
_UNQUOTED = string.punctuation.replace("%", "") + " "
Request = pb.TaskRequest | pb.InferRequest | pb.PredictRequest


# -- requests ------------------------------------------------------------------------------


def to_request(request: InferRequest, remaining_s: float) -> pb.PredictRequest:
    """A gateway's request to a worker; `remaining_s` is the time until the deadline."""
    inputs = request.inputs
    pixels = [item for item in inputs if isinstance(item, np.ndarray)]
    latents = [item.vector for item in inputs if isinstance(item, Latent)]
    return pb.PredictRequest(
        images=[item for item in inputs if isinstance(item, bytes)],
        pixel_values=to_tensors({"pixel_values": array} for array in pixels),
        texts=[item for item in inputs if isinstance(item, str)],
        videos=[item.content for item in inputs if isinstance(item, Video)],
        seeds=[item.value for item in inputs if isinstance(item, Seed)],
        latents=to_tensors({"latent": vector} for vector in latents),
        calls=[_to_call(call) for call in request.calls],
        timeout_ms=max(remaining_s, 0.001) * 1e3,
        priority=pb.PRIORITY_BULK if request.bulk else pb.PRIORITY_INTERACTIVE,
    )


def from_inputs(request: Request) -> list[Input]:
    """A request's inputs, all of one kind. `count_inputs` says how many, before they are made.

    Raises:
        InvalidInputError: several kinds, a malformed tensor or one without elements, a value that
            is not finite, or a negative seed.
    """
    message = _inputs_of(request)
    kinds: list[list[Input]] = [
        list(message.images),
        [_from_input(tensor) for tensor in message.pixel_values],
        list(message.texts),
        [Video(content) for content in message.videos],
        [Seed(value) for value in message.seeds],
        [Latent(_from_input(tensor)) for tensor in message.latents],
    ]
    inputs = [kind for kind in kinds if kind]
    if len(inputs) > 1:
        raise InvalidInputError(
            "a request has inputs of one kind: images, pixel_values, texts, videos, seeds or "
            "latents",
            field="images",
        )
    if any(value < 0 for value in message.seeds):
        raise InvalidInputError("a seed is not negative", field="seeds")
    return inputs[0] if inputs else []


def count_inputs(request: Request) -> int:
    """The number of a request's inputs, of whichever kinds."""
    message = _inputs_of(request)
    return sum(len(getattr(message, name)) for name in pb.Inputs.DESCRIPTOR.fields_by_name)


def from_call(model: str, task: str, options: Struct) -> Call:
    """A call, validated by its task's options.

    Args:
        model: empty for the task's default model.
        task: empty for the model's own task.

    Raises:
        InvalidInputError: options without a task, or an option that is an input and is sent as
            one, such as a seed.
        InvalidParametersError: an unknown option, or a value out of range.
    """
    values = from_options(options)
    if task in tasks() and (inputs := tasks()[task].options.input_fields & values.keys()):
        raise InvalidInputError(
            f"{', '.join(sorted(inputs))}: send the inputs of {task} as inputs, not as options",
            field="options",
        )
    return validated_call(model or None, task or None, values)


def from_options(options: Struct) -> dict[str, Any]:
    """A Struct as plain values.

    Raises:
        InvalidInputError: a number is not finite.
    """
    try:
        return MessageToDict(options)
    except ValueError as error:
        raise InvalidInputError("options have finite numbers", field="options") from error


def _from_input(tensor: pb.Tensor) -> np.ndarray:
    """The array of an input, which has finite numbers."""
    if tensor.datatype == "BYTES" or not element_count(tensor.name, tensor.shape):
        raise InvalidInputError(f"{tensor.name} has no numbers", field=tensor.name)
    return check_finite(tensor.name, from_tensor(tensor))


def _inputs_of(request: Request) -> pb.Inputs | pb.TaskRequest | pb.PredictRequest:
    """The message that has the fields of `Inputs`."""
    return request.inputs if isinstance(request, pb.InferRequest) else request


def _to_call(call: Call) -> pb.Call:
    options = Struct()
    options.update(dict(call.options))
    return pb.Call(model=call.model or "", task=call.task or "", options=options)


# -- results -------------------------------------------------------------------------------


def to_task_response(result: InferResult) -> pb.TaskResponse:
    """The results of a request for one model."""
    return pb.TaskResponse(
        model=_to_used(result.models[0]), results=[_to_result(image) for image in result.images]
    )


def to_response(result: InferResult) -> pb.PredictResponse:
    """The results of a request for several models."""
    return pb.PredictResponse(
        models=[_to_used(used) for used in result.models],
        results=[
            pb.PredictResult(
                outputs=[_to_output(output) for output in image.outputs],
                error=to_error(image.error) if image.error else None,
                timing=_to_timing(image.timing),
            )
            for image in result.images
        ],
    )


def from_response(response: pb.PredictResponse) -> InferResult:
    """A worker's results, equal to those of a backend in this process."""
    models = [
        ModelUsed(used.name, used.task, used.model_digest, used.preprocess_digest)
        for used in response.models
    ]
    return InferResult(models, [_from_result(result) for result in response.results])


def to_error(error: ServiceError) -> pb.Error:
    """An error with all that a client needs to handle it."""
    return pb.Error(
        code=error.slug,
        detail=error.detail,
        fields=[pb.FieldError(field=item.field, detail=item.detail) for item in error.fields],
        retry_after_s=error.retry_after_s,
    )


def to_trailer(error: ServiceError) -> tuple[str, pb.Error]:
    """The text of a call's status, and the error for its trailing metadata.

    Of long ones the ends of the texts are left out, and fields after the tenth: gRPC's clients
    refuse trailers over 8 KiB, and report RESOURCE_EXHAUSTED instead of the status.
    """
    text, told, length = error.detail, to_error(error), MAX_DETAIL
    while len(quote(text, safe=_UNQUOTED)) > MAX_TEXT_BYTES:
        text = cut(text, len(text) // 2)
    while told.ByteSize() > MAX_ERROR_BYTES:
        length //= 2
        told.detail = cut(told.detail, length)
        del told.fields[10:]
        for item in told.fields:
            item.field, item.detail = cut(item.field, length), cut(item.detail, length)
    return text, told


def from_error(error: pb.Error) -> ServiceError:
    """The error that a server sent. An unknown code becomes an internal error."""
    return BY_SLUG.get(error.code, InternalError)(
        error.detail,
        fields=[FieldError(item.field, item.detail) for item in error.fields],
        retry_after_s=error.retry_after_s if error.HasField("retry_after_s") else None,
    )


def to_tensors(named: Iterable[Mapping[str, np.ndarray]]) -> list[pb.Tensor]:
    """Named arrays as tensors, in order."""
    return [
        pb.Tensor(
            name=name, datatype=datatype_of(array), shape=array.shape, contents=to_bytes(array)
        )
        for arrays in named
        for name, array in arrays.items()
    ]


def from_tensor(tensor: pb.Tensor) -> np.ndarray:
    """A tensor's array."""
    return from_bytes(tensor.name, tensor.datatype, list(tensor.shape), tensor.contents)


def _to_result(image: ImageResult) -> pb.Result:
    output: Output = image.error or image.outputs[0]
    timing = _to_timing(image.timing)
    if isinstance(output, ServiceError):
        return pb.Result(error=to_error(output), timing=timing)
    return pb.Result(tensors=to_tensors([output]), timing=timing)


def _to_output(output: Output) -> pb.Output:
    if isinstance(output, ServiceError):
        return pb.Output(error=to_error(output))
    return pb.Output(tensors=to_tensors([output]))


def _from_result(result: pb.PredictResult) -> ImageResult:
    timing = None
    if result.HasField("timing"):
        message = result.timing
        timing = Timing(message.decode_ms, message.queue_ms, message.compute_ms, message.batch_size)
    if result.HasField("error"):
        return ImageResult(error=from_error(result.error), timing=timing)
    return ImageResult([_from_output(output) for output in result.outputs], timing=timing)


def _from_output(output: pb.Output) -> Output:
    if output.HasField("error"):
        return from_error(output.error)
    return {tensor.name: from_tensor(tensor) for tensor in output.tensors}


def _to_used(used: ModelUsed) -> pb.ModelUsed:
    return pb.ModelUsed(
        name=used.name,
        task=used.task,
        model_digest=used.model_digest,
        preprocess_digest=used.preprocess_digest,
    )


def _to_timing(timing: Timing | None) -> pb.Timing | None:
    if timing is None:
        return None
    return pb.Timing(
        decode_ms=timing.decode_ms,
        queue_ms=timing.queue_ms,
        compute_ms=timing.compute_ms,
        batch_size=timing.batch_size,
    )


def to_model(model: HeadDescription) -> pb.Model:
    """A model's description."""
    return pb.Model(
        name=model.name, ready=model.is_ready, description_json=json.dumps(model.to_json())
    )
