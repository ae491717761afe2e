"""Bodies that register regions of shared memory."""

from pydantic import BaseModel, Field

from service.limits import Share
from service.parameters import validate
from service.payloads import decode_base64, parse_json_object

MAX_HANDLE = 1024  # characters


class RegionRequest(BaseModel):
    """A region of system shared memory: bytes of the object `key`."""

    key: str
    offset: int = 0
    byte_size: int


class _Handle(BaseModel):
    b64: str = Field(max_length=MAX_HANDLE)


class CudaRegionRequest(BaseModel):
    """A region of CUDA shared memory: the beginning of a handle's memory."""

    raw_handle: _Handle
    device_id: int
    byte_size: int

    @property
    def handle(self) -> bytes:
        """
        Raises:
            InvalidInputError: it is not base64.
        """
        return decode_base64(self.raw_handle.b64, "raw_handle")


async def parse_region(content: bytes, share: Share) -> RegionRequest:
    """The body that registers a region of system shared memory."""
    return validate(RegionRequest, await parse_json_object(content, share))


async def parse_cuda_region(content: bytes, share: Share) -> CudaRegionRequest:
    """The body that registers a region of CUDA shared memory."""
    return validate(CudaRegionRequest, await parse_json_object(content, share))
