"""What Python processes that do one thing for their parent have in common. Needs no torch."""

import os
import resource
import sys


def child_environment() -> dict[str, str]:
    """The environment of such a process: without the settings, which hold keys."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("VITRAIL_")},
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",  # numpy would reserve memory for its threads
    }


def limit_memory(further_bytes: int) -> None:
    """Let this process have so much more address space than it has now, and no core dump."""
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    limit = own + further_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
