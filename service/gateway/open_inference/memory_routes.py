"""Triton's shared memory extensions over REST.

They are not in the OpenAPI document: only Triton's clients use them, with memory of this machine.
"""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from service.gateway.auth import require_key
from service.gateway.open_inference.regions import parse_cuda_region, parse_region
from service.gateway.rest.content import read_body, share_of
from service.open_inference.cuda_memory import CudaRegion
from service.open_inference.shared_memory import OwnedMemory, SharedMemory
from service.open_inference.system_memory import SystemRegion

router = APIRouter(prefix="/v2", include_in_schema=False, dependencies=[Depends(require_key)])


def memory_of(request: Request) -> OwnedMemory:
    """The regions that the caller's key has registered with this process."""
    memory: SharedMemory = request.app.state.memory
    return memory.of(request.scope["state"].get("key"))


@router.get("/systemsharedmemory/status")
@router.get("/systemsharedmemory/region/{region}/status")
async def regions(request: Request, region: str = "") -> list[dict[str, Any]]:
    """List the regions of system shared memory that are registered, or describe one."""
    return [found.to_json() for found in memory_of(request).status(SystemRegion, region)]


@router.post("/systemsharedmemory/region/{region}/register", response_class=Response)
async def register(request: Request, region: str) -> Response:
    """Register a region of system shared memory, which inputs and outputs may then name."""
    given = await parse_region(await read_body(request), share_of(request))
    await memory_of(request).register(region, given.key, given.offset, given.byte_size)
    return Response()


@router.post("/systemsharedmemory/unregister", response_class=Response)
@router.post("/systemsharedmemory/region/{region}/unregister", response_class=Response)
async def unregister(request: Request, region: str = "") -> Response:
    """Forget a region of system shared memory, or all of them."""
    await memory_of(request).unregister(SystemRegion, region)
    return Response()


@router.get("/cudasharedmemory/status")
@router.get("/cudasharedmemory/region/{region}/status")
async def cuda_regions(request: Request, region: str = "") -> list[dict[str, Any]]:
    """List the regions of CUDA shared memory that are registered, or describe one."""
    return [found.to_json() for found in memory_of(request).status(CudaRegion, region)]


@router.post("/cudasharedmemory/region/{region}/register", response_class=Response)
async def register_cuda(request: Request, region: str) -> Response:
    """Register a region of CUDA shared memory, which inputs and outputs may then name."""
    given = await parse_cuda_region(await read_body(request), share_of(request))
    await memory_of(request).register_cuda(region, given.handle, given.device_id, given.byte_size)
    return Response()


@router.post("/cudasharedmemory/unregister", response_class=Response)
@router.post("/cudasharedmemory/region/{region}/unregister", response_class=Response)
async def unregister_cuda(request: Request, region: str = "") -> Response:
    """Close a region of CUDA shared memory, or all of them."""
    await memory_of(request).unregister(CudaRegion, region)
    return Response()
