"""Triton's shared memory extensions over REST.

They are not in the OpenAPI document: only Triton's clients use them, with memory of this machine.
"""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from service.errors import InvalidInputError
from service.gateway.auth import require_key
from service.gateway.open_inference.codec import parse_region
from service.gateway.rest.content import read_body, share_of
from service.open_inference.shared_memory import CUDA, OwnedMemory, SharedMemory

router = APIRouter(prefix="/v2", include_in_schema=False, dependencies=[Depends(require_key)])


def memory_of(request: Request) -> OwnedMemory:
    """The regions that the caller's key has registered with this process."""
    memory: SharedMemory = request.app.state.memory
    return memory.of(request.scope["state"].get("key"))


@router.get("/systemsharedmemory/status")
@router.get("/systemsharedmemory/region/{region}/status")
async def regions(request: Request, region: str = "") -> list[dict[str, Any]]:
    """List the regions of system shared memory that are registered, or describe one."""
    return [asdict(found) for found in memory_of(request).status(region)]


@router.post("/systemsharedmemory/region/{region}/register", response_class=Response)
async def register(request: Request, region: str) -> Response:
    """Register a region of system shared memory, which inputs and outputs may then name."""
    given = await parse_region(await read_body(request), share_of(request))
    memory_of(request).register(region, given.key, given.offset, given.byte_size)
    return Response()


@router.post("/systemsharedmemory/unregister", response_class=Response)
@router.post("/systemsharedmemory/region/{region}/unregister", response_class=Response)
async def unregister(request: Request, region: str = "") -> Response:
    """Forget a region of system shared memory, or all of them."""
    memory_of(request).unregister(region)
    return Response()


@router.get("/cudasharedmemory/status")
async def cuda_regions() -> list[dict[str, Any]]:
    """List the regions of CUDA shared memory: none, as it is not supported."""
    return []


@router.post("/cudasharedmemory/unregister", response_class=Response)
async def unregister_cuda() -> Response:
    """Forget all regions of CUDA shared memory: none can be registered."""
    return Response()


@router.post("/cudasharedmemory/region/{region}/register")
async def register_cuda(region: str) -> None:
    """Refused: CUDA shared memory is not supported."""
    raise InvalidInputError(CUDA)
