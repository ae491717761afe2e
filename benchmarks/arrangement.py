"""How a bare loop's work is spread over cores."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """
    Args:
        processes: each with a model of its own.
        loops: threads of a process that run passes.
        threads: CPU threads of a pass.
        batch: images in a pass.
        decoders: threads of a process that decode; 0: each loop decodes its own images.
    """

    processes: int = 1
    loops: int = 1
    threads: int = 1
    batch: int = 1
    decoders: int = 0


def arrangements(cores: int) -> dict[str, Arrangement]:
    """The arrangements that are tried, by the names that reports have."""
    return {
        "one image on all cores": Arrangement(threads=cores),
        "threads, batches of 4": Arrangement(loops=cores, batch=4),
        "decoding threads, batches of 4": Arrangement(loops=cores, batch=4, decoders=cores),
        "processes, batches of 4": Arrangement(processes=cores, batch=4),
    }
