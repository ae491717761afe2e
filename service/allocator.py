"""Keep freed memory in the process: the fast allocation, as a default.

glibc gives large buffers back to the kernel as soon as they are freed, and a convolutional net
frees all of its buffers on every pass; the next pass then pays for each page again. Raising its
thresholds, and keeping to one arena (further ones are capped at 64 MB and trimmed regardless),
ends that. Measured by benchmarks/allocator.py.
"""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tune this process' allocator; call before large buffers and threads exist.

    Returns False where the C library has no `mallopt` (musl, macOS) and nothing was changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [
        mallopt(option, value)
        for option, value in (
            (M_MMAP_THRESHOLD, NEVER),
            (M_TRIM_THRESHOLD, NEVER),
            (M_ARENA_MAX, 1),
        )
    ]
    return all(done)
