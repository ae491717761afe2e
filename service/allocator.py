"""Tunes glibc's allocator to keep freed memory in the process.

glibc returns large buffers to the kernel as soon as they are freed. A convolutional network frees
all of its buffers after every pass, and the next pass pays for each page again. Higher thresholds
prevent that, together with a single arena: glibc trims further arenas, of at most 64 MB each,
regardless of the thresholds. benchmarks/allocator.py measures the effect.
"""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tune this process's allocator. Call it before large buffers and threads exist.

    Returns:
        False if the C library has no `mallopt` (musl, macOS), so that nothing was changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    results = [
        mallopt(option, value)
        for option, value in (
            (M_MMAP_THRESHOLD, NEVER),
            (M_TRIM_THRESHOLD, NEVER),
            (M_ARENA_MAX, 1),
        )
    ]
    return all(results)


def return_freed_memory() -> None:
    """Give what is free now back to the kernel, such as tensors that only loading needed."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
