"""The methods of the Open Inference Protocol's gRPC service for shared memory."""

from collections.abc import Iterable
from typing import TypeVar

from service.open_inference.cuda_memory import CudaRegion
from service.open_inference.region import Region
from service.open_inference.system_memory import SystemRegion
from service.rpc.context import Caller, Context, Deps, handle_call
from service.stubs import open_inference_pb2 as pb
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceServicer

R = TypeVar("R", bound=Region)


class MemoryCalls(GRPCInferenceServiceServicer):
    """The part of the servicer for shared memory."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        async with handle_call(self._deps, context, "SystemSharedMemoryStatus") as caller:
            found = self._deps.memory.of(caller.key).status(SystemRegion, request.name)
            regions = {
                name: pb.SystemSharedMemoryStatusResponse.RegionStatus(
                    name=region.name,
                    key=region.key,
                    offset=region.offset,
                    byte_size=region.byte_size,
                )
                for name, region in _by_name(found, caller).items()
            }
            return pb.SystemSharedMemoryStatusResponse(regions=regions)

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        async with handle_call(self._deps, context, "SystemSharedMemoryRegister") as caller:
            await self._deps.memory.of(caller.key).register(
                request.name, request.key, request.offset, request.byte_size
            )
            return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        async with handle_call(self._deps, context, "SystemSharedMemoryUnregister") as caller:
            await self._deps.memory.of(caller.key).unregister(SystemRegion, request.name)
            return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        async with handle_call(self._deps, context, "CudaSharedMemoryStatus") as caller:
            found = self._deps.memory.of(caller.key).status(CudaRegion, request.name)
            regions = {
                name: pb.CudaSharedMemoryStatusResponse.RegionStatus(
                    name=region.name, device_id=region.device_id, byte_size=region.byte_size
                )
                for name, region in _by_name(found, caller).items()
            }
            return pb.CudaSharedMemoryStatusResponse(regions=regions)

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        async with handle_call(self._deps, context, "CudaSharedMemoryRegister") as caller:
            await self._deps.memory.of(caller.key).register_cuda(
                request.name, request.raw_handle, request.device_id, request.byte_size
            )
            return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        async with handle_call(self._deps, context, "CudaSharedMemoryUnregister") as caller:
            await self._deps.memory.of(caller.key).unregister(CudaRegion, request.name)
            return pb.CudaSharedMemoryUnregisterResponse()


def _by_name(regions: Iterable[R], caller: Caller) -> dict[str, R]:
    """Regions by name; those of other owners, whose names may be the same, by OWNER/NAME."""
    owner = "" if caller.key is None else caller.key.id
    return {
        each.name if each.owner == owner else f"{each.owner}/{each.name}": each for each in regions
    }
