"""The Open Inference Protocol's gRPC service."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict

from service.accounting import counted
from service.errors import InvalidInputError
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
from service.open_inference.shared_memory import CUDA, OwnedMemory, Region, place_of
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

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        async with handle_call(self._deps, context, "SystemSharedMemoryStatus") as caller:
            found = self._deps.memory.of(caller.key).status(request.name)
            return pb.SystemSharedMemoryStatusResponse(
                regions=_by_name(found, "" if caller.key is None else caller.key.id)
            )

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        async with handle_call(self._deps, context, "SystemSharedMemoryRegister") as caller:
            self._deps.memory.of(caller.key).register(
                request.name, request.key, request.offset, request.byte_size
            )
            return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        async with handle_call(self._deps, context, "SystemSharedMemoryUnregister") as caller:
            self._deps.memory.of(caller.key).unregister(request.name)
            return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        async with handle_call(self._deps, context, "CudaSharedMemoryStatus"):
            return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        async with handle_call(self._deps, context, "CudaSharedMemoryRegister"):
            raise InvalidInputError(CUDA)

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        async with handle_call(self._deps, context, "CudaSharedMemoryUnregister"):
            return pb.CudaSharedMemoryUnregisterResponse()

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        deps = self._deps
        async with handle_call(deps, context, "ModelInfer", task="open-inference") as caller:
            knows = deps.backend.knows
            with counted(deps.metrics, knows, "open-inference", caller.started) as account:
                account.models = [request.model_name]
                check_version(request.model_version)
                if len(request.id) > MAX_ID:
                    raise InvalidInputError(f"the id has more than {MAX_ID} characters", field="id")
                model = await deps.backend.model(request.model_name)
                options = _values(request.parameters)
                timeout = timeout_ms(options.pop("timeout", 0)) or 0.0
                account.deadline = caller.deadline(deps.settings, timeout)
                bulk = bool(is_bulk(options.pop("priority", None)))
                outputs = [_requested(output) for output in request.outputs]
                selection = OutputSelection(model, outputs, options)
                memory = deps.memory.of(caller.key)
                assert caller.share is not None
                tensors = self._tensors(request, memory, caller.share)
                inputs = await read_inputs(tensors, deps.settings, caller.share)
                deps.keys.count_images(caller.key, len(inputs))
                result = await deps.backend.infer(
                    InferRequest(
                        inputs=inputs,
                        calls=selection.calls,
                        deadline=account.deadline,
                        bulk=bulk,
                    )
                )
                account.answered(result)
                arrays = selection.collect(result)
                return _response(request, selection.requested, arrays, memory)

    def _tensors(
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
                content = memory.read(place, left)
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


def _by_name(
    regions: Sequence[Region], owner: str
) -> dict[str, pb.SystemSharedMemoryStatusResponse.RegionStatus]:
    """Regions by name; those of other owners, whose names may be the same, by OWNER/NAME."""
    return {
        region.name
        if region.owner == owner
        else f"{region.owner}/{region.name}": pb.SystemSharedMemoryStatusResponse.RegionStatus(
            name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
        )
        for region in regions
    }


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof("parameter_choice"))
    }


def _response(
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
            memory.write(output.place, contents[number])
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
