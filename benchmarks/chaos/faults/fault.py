"""What a fault is."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.chaos.target import Target

# How long a fault lasts that does not end by itself.
FAULT_S = 3.0


class SkippedError(Exception):
    """This fault cannot be injected here."""


@dataclass(frozen=True, slots=True)
class Fault:
    """
    Args:
        inject: injects it and returns once everything runs again. Raises AssertionError where the
            server answers otherwise than it should.
        cuts: whether connections end with the process that the fault is about.
        refuses: whether it leaves no worker for a while.
        stops_all: whether it leaves no gateway for a while, so that nothing answers `/healthz`.
    """

    inject: Callable[[Target], None]
    cuts: bool = False
    refuses: bool = False
    stops_all: bool = False
