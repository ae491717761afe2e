"""Batch sizes that engines with fixed shapes have programs for. Pure policy.

Batches are padded up to the next bucket. Powers of two would waste up to half of a pass; of these
buckets a batch of 4 or more rows fills three quarters at least.
"""

# Up to this many rows, buckets are this many rows apart.
STEPS = ((4, 1), (8, 2), (32, 4), (64, 8), (128, 16), (512, 32))


def bucket_of(size: int) -> int:
    """The smallest bucket that holds `size` rows; beyond all buckets the size itself."""
    for limit, step in STEPS:
        if size <= limit:
            return -(-size // step) * step
    return size


def buckets(largest: int) -> list[int]:
    """All buckets for batches of up to `largest` rows."""
    return sorted({bucket_of(size) for size in range(1, largest + 1)})
