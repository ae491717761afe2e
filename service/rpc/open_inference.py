"""The Open Inference Protocol's gRPC service."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.accounting import counted
from service.errors import InvalidInputError
from service.open_inference.inputs import InputTensor, timeout_ms, to_inputs
from service.open_inference.metadata import (
    VERSION,
    check_version,
    model_metadata,
    repository_index,
    server_metadata,
)
from service.open_inference.outputs import OutputSelection, RequestedOutput
from service.rpc.context import Context, Deps, handle_call
from service.stubs import open_inference_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceServicer
from service.tensors import datatype_of, to_bytes
from service.types import InferRequest


class OpenInference(GRPCInferenceServiceServicer):
    """The protocol's methods, and those of Triton's model repository extension."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
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

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        deps = self._deps
        async with handle_call(deps, context, "ModelInfer", task="open-inference") as caller:
            knows = deps.backend.knows
            with counted(deps.metrics, knows, "open-inference", caller.started) as account:
                account.models = [request.model_name]
                check_version(request.model_version)
                model = await deps.backend.model(request.model_name)
                options = _values(request.parameters)
                timeout = timeout_ms(options.pop("timeout", 0)) or 0.0
                account.deadline = caller.deadline(deps.settings, timeout)
                outputs = [_requested(output) for output in request.outputs]
                selection = OutputSelection(model, outputs, options)
                inputs = to_inputs(_tensors(request), deps.settings)
                deps.keys.count_images(caller.key, len(inputs))
                result = await deps.backend.infer(
                    InferRequest(inputs=inputs, calls=selection.calls, deadline=account.deadline)
                )
                account.answered(result)
                return _response(request, selection.requested, selection.collect(result))


def _tensors(request: pb.ModelInferRequest) -> list[InputTensor]:
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidInputError(
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs", field="inputs"
        )
    return [
        InputTensor(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=list(tensor.shape),
            raw=raw[position] if raw else None,
            values=tensor.contents.bytes_contents
            or tensor.contents.fp32_contents
            or tensor.contents.int64_contents,
        )
        for position, tensor in enumerate(request.inputs)
    ]


def _requested(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    count = _values(output.parameters).get("classification", 0)
    if not isinstance(count, int):
        raise InvalidInputError("classification is a positive number", field="outputs")
    return RequestedOutput(output.name, classification=count)


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof("parameter_choice"))
    }


def _response(
    request: pb.ModelInferRequest, outputs: Sequence[RequestedOutput], arrays: list[np.ndarray]
) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(
        model_name=request.model_name,
        model_version=VERSION,
        id=request.id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=output.name, datatype=datatype_of(array), shape=array.shape
            )
            for output, array in zip(outputs, arrays, strict=True)
        ],
        raw_output_contents=[to_bytes(array) for array in arrays],
    )
