"""The methods of the Open Inference Protocol's gRPC service for shared memory."""

from collections.abc import Sequence

from service.errors import InvalidInputError
from service.open_inference.shared_memory import CUDA, Region
from service.rpc.context import Context, Deps, handle_call
from service.stubs import open_inference_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceServicer


class MemoryCalls(GRPCInferenceServiceServicer):
    """The part of the servicer for shared memory."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

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
