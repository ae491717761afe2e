"""Errors of a GPU, in contrast to those of an input: too little memory, and a device that is lost.

After some errors every later CUDA call of the process fails, whatever it is for: the context is
poisoned, or the GPU has gone. Only a new process can use the device again.
"""

import re

import torch

from models.trunks.compute_stream import compute_stream

# What torch writes before CUDA's and its libraries' own words.
CUDA = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")
# What torch writes when the machine's memory ran out, for which it has no type.
CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# What compilers write, in errors of their own types: Triton's, and Inductor's around torch's.
COMPILERS_MEMORY = ("Triton Error [CUDA]: out of memory", "CUDA out of memory")
# What torchcodec writes with nvJPEG's NVJPEG_STATUS_ALLOCATOR_FAILURE. nvJPEG allocates memory
# itself, beside torch's allocator.
# https://docs.nvidia.com/cuda/nvjpeg/index.html#nvjpeg-api-return-codes
NVJPEG_MEMORY = re.compile(
    r"Failed to (?:initialize|create|attach|parse|decode|transfer)[\w ]*: 5\b"
)
# CUDA's words for errors that stay, from `cudaGetErrorString`. A call after one of these may hang,
# so they are known by name.
# https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
LASTING = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "misaligned address",
    "hardware stack error",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected",
    "Invalid access of peer GPU memory over nvlink or a hardware error",
    "tensor memory not completely freed",
    "an async error has occured in external entity outside of CUDA",
    "the MPS client has been terminated by the server",
    "context is destroyed",
    "driver shutting down",
    "CUDA-capable device(s) is/are busy or unavailable",
    "no CUDA-capable device is detected",
    "unknown error",
)


def is_cuda_error(error: BaseException) -> bool:
    """Whether CUDA or one of its libraries has reported this error."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in CUDA)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory ran out: in torch's allocator, in CUDA itself, or in nvJPEG. The
    capture of a graph in which that happens ends with an error of its own, whose context it is."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if any(words in str(error) for words in (CPU_MEMORY, *COMPILERS_MEMORY)):
        return True
    if isinstance(error, RuntimeError) and NVJPEG_MEMORY.search(str(error)):
        return True
    if not is_cuda_error(error):
        return False
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if any(word in str(error) for word in words):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def is_lost(error: BaseException, device: torch.device) -> bool:
    """Whether this process can no longer use the device. Other errors of CUDA than the LASTING ones
    are such if the device then fails to finish its work."""
    if not is_cuda_error(error) or is_out_of_memory(error):
        return False
    if any(words in str(error) for words in LASTING):
        return True
    if device.type != "cuda":
        return False
    try:
        # A graph that another thread captures meanwhile would fail, and so would this call.
        with compute_stream(device).lock:
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
