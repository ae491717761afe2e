"""Spares requests the pauses of Python's cyclic garbage collector.

A full collection looks at every object of the process while no other thread may run. Modules and
networks are a million objects, which live as long as the process and take 0.4 s to look at.
"""

import gc

# New objects per collection of the youngest ones. Python's default, 700, is a few requests' worth.
YOUNG_OBJECTS = 10_000


def leave_out_old_objects(*, collect: bool = True) -> None:
    """Let the collector look only at objects that are made from now on.

    Objects are still freed when nothing refers to them. Only cycles among the old ones stay, until
    `look_at_all_objects`; those that are garbage already are freed now.

    Args:
        collect: false if a full collection has just been made.
    """
    gc.set_threshold(YOUNG_OBJECTS)
    if collect:
        gc.collect()
    gc.freeze()


def full_collections() -> int:
    """How many full collections there have been."""
    return int(gc.get_stats()[-1]["collections"])


def look_at_all_objects() -> None:
    """Let the next full collection look at everything, so that it frees an unloaded network."""
    gc.unfreeze()
