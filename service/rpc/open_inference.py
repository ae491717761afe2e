"""The Open Inference Protocol's gRPC service."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict

from service.accounting import counted
from service.errors import InvalidInputError, ServiceError
from service.limits import Share
from service.open_inference.inputs import MAX_ID, InputTensor, is_bulk, read_inputs, timeout_ms
from service.open_inference.metadata import (
    VERSION,
    check_version,
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from service.open_inference.outputs import OutputSelection, RequestedOutput
from service.open_inference.shared_memory import OwnedMemory, place_of
from service.rpc.context import Caller, Context, Deps, handle_call
from service.rpc.memory import MemoryCalls
from service.rpc.streams import in_order, infer
from service.stubs import open_inference_pb2 as pb
from service.tensors import datatype_of, to_bytes
from service.types import InferRequest

# The name under which requests are counted.
TASK = "open-inference"


class OpenInference(MemoryCalls):
    """The protocol's methods, and those of Triton's extensions."""

    def __init__(self, deps: Deps) -> None:
        super().__init__(deps)
        self._backend = deps.backend

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._backend.health().live)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._backend.health().ready)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        async with handle_call(self._deps, context, "ModelReady"):
            check_version(request.version)
            return pb.ModelReadyResponse(ready=(await self._backend.model(request.name)).is_ready)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**server_metadata())

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        async with handle_call(self._deps, context, "ModelMetadata"):
            check_version(request.version)
            return pb.ModelMetadataResponse(
                **model_metadata(await self._backend.model(request.name))
            )

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        async with handle_call(self._deps, context, "RepositoryIndex"):
            index = repository_index(await self._backend.models(), request.ready)
            models = [pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in index]
            return pb.RepositoryIndexResponse(models=models)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        async with handle_call(self._deps, context, "RepositoryModelLoad", scope="admin"):
            await self._backend.load(request.model_name)
            return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        async with handle_call(self._deps, context, "RepositoryModelUnload", scope="admin"):
            await self._backend.unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        async with handle_call(self._deps, context, "ModelConfig"):
            check_version(request.version)
            model = await self._backend.model(request.name)
            config = model_config(model, self._deps.settings.max_images)
            return ParseDict({"config": config}, pb.ModelConfigResponse())

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        async with handle_call(self._deps, context, "ModelStatistics"):
            check_version(request.version)
            backend = self._backend
            models = [await backend.model(request.name)] if request.name else await backend.models()
            statistics = model_statistics(models, self._deps.metrics.statistics)
            return ParseDict({"model_stats": statistics}, pb.ModelStatisticsResponse())

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        async with handle_call(self._deps, context, "ModelInfer", task=TASK) as caller:
            return await self._infer(request, caller)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Triton's stream, with the order that Triton keeps for models with one response."""
        async with handle_call(self._deps, context, "ModelStreamInfer") as caller:
            answers = in_order(requests, partial(self._answer, stream=caller))
            async with aclosing(answers):
                async for answer in answers:
                    yield answer

    async def _answer(
        self, request: pb.ModelInferRequest, stream: Caller
    ) -> pb.ModelStreamInferResponse:
        """The response to one request of a stream, or why there is none."""
        assert stream.share is not None
        refusal = ""
        try:
            with self._deps.budget.share(stream.share.client) as share:
                response = await self._infer(request, replace(stream.next_request(), share=share))
        except ServiceError as error:
            refusal = error.detail
            response = pb.ModelInferResponse(
                model_name=request.model_name,
                model_version=request.model_version,
                id=request.id[:MAX_ID],
            )
        response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(error_message=refusal, infer_response=response)

    async def _infer(self, request: pb.ModelInferRequest, caller: Caller) -> pb.ModelInferResponse:
        deps = self._deps
        with counted(deps.metrics, deps.backend.knows, TASK, caller.started) as account:
            account.models = [request.model_name]
            check_version(request.model_version)
            if len(request.id) > MAX_ID:
                raise InvalidInputError(f"the id has more than {MAX_ID} characters", field="id")
            model = await deps.backend.model(request.model_name)
            options = _values(request.parameters)
            options.pop("triton_enable_empty_final_response", None)  # there are no empty ones
            timeout = timeout_ms(options.pop("timeout", 0)) or 0.0
            account.deadline = caller.deadline(deps.settings, timeout)
            bulk = bool(is_bulk(options.pop("priority", None)))
            outputs = [_requested(output) for output in request.outputs]
            selection = OutputSelection(model, outputs, options)
            memory = deps.memory.of(caller.key)
            assert caller.share is not None
            tensors = await self._tensors(request, memory, caller.share)
            inputs = await read_inputs(tensors, deps.settings, caller.share)
            infer_request = InferRequest(
                inputs=inputs, calls=selection.calls, deadline=account.deadline, bulk=bulk
            )
            result = await infer(deps, caller, infer_request)
            account.answered(result)
            arrays = selection.collect(result)
            return await _response(request, selection.requested, arrays, memory)

    async def _tensors(
        self, request: pb.ModelInferRequest, memory: OwnedMemory, share: Share
    ) -> list[InputTensor]:
        """The inputs, with their contents: those in shared memory, which count as bytes of the
        request, the raw ones in order, or values."""
        raw = iter(request.raw_input_contents)
        left = self._deps.settings.max_request_bytes  # for all inputs in shared memory together
        tensors = []
        for tensor in request.inputs:
            content: bytes | None
            if (place := place_of(_values(tensor.parameters))) is not None:
                share.add(place.byte_size)
                content = await memory.read(place, left)
                left -= place.byte_size
            else:
                content = next(raw, None) if request.raw_input_contents else None
                if content is None and request.raw_input_contents:
                    raise InvalidInputError(
                        f"{len(request.raw_input_contents)} raw_input_contents for "
                        f"{len(request.inputs)} inputs",
                        field="inputs",
                    )
            values = tensor.contents
            tensors.append(
                InputTensor(
                    name=tensor.name,
                    datatype=tensor.datatype,
                    shape=list(tensor.shape),
                    raw=content,
                    values=values.bytes_contents
                    or values.fp32_contents
                    or values.int64_contents
                    or values.uint_contents,
                )
            )
        if next(raw, None) is not None:
            raise InvalidInputError(
                f"more raw_input_contents than inputs: {len(request.raw_input_contents)}",
                field="inputs",
            )
        return tensors


def _requested(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    count = _values(output.parameters).get("classification", 0)
    if not isinstance(count, int):
        raise InvalidInputError("classification is a positive number", field="outputs")
    place = place_of(_values(output.parameters))
    return RequestedOutput(output.name, classification=count, place=place)


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof("parameter_choice"))
    }


async def _response(
    request: pb.ModelInferRequest,
    outputs: Sequence[RequestedOutput],
    arrays: list[np.ndarray],
    memory: OwnedMemory,
) -> pb.ModelInferResponse:
    contents = [to_bytes(array) for array in arrays]
    parameters: list[dict[str, pb.InferParameter]] = []
    for number, output in enumerate(outputs):
        parameters.append({})
        if output.place is not None:
            await memory.write(output.place, contents[number])
            parameters[-1] = {
                "shared_memory_region": pb.InferParameter(string_param=output.place.region),
                "shared_memory_offset": pb.InferParameter(int64_param=output.place.offset),
                "shared_memory_byte_size": pb.InferParameter(int64_param=len(contents[number])),
            }
            contents[number] = b""  # there is one for each output
    return pb.ModelInferResponse(
        model_name=request.model_name,
        model_version=VERSION,
        id=request.id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=output.name,
                datatype=datatype_of(array),
                shape=array.shape,
                parameters=given,
            )
            for output, array, given in zip(outputs, arrays, parameters, strict=True)
        ],
        raw_output_contents=contents,
    )
