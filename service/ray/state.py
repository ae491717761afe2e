"""What every replica must have beyond the catalog: heads, and models loaded or unloaded.

One actor of the cluster keeps it. Replicas ask it once a second what has changed since they last
asked, so that a replica which starts later gets the same heads.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAME, NAMESPACE = "vitrail-state", "vitrail"
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed since a version.

    Args:
        heads: the content of their files by name; None for deleted ones.
        loaded: whether models are to be loaded.
    """

    version: int
    heads: dict[str, bytes | None] = field(default_factory=dict)
    loaded: dict[str, bool] = field(default_factory=dict)


class State:
    """The actor's state. Heads are also files in a folder of its node, as `vitrail serve` has."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._version = 1
        self._heads: dict[str, tuple[int, bytes | None]] = {
            path.stem: (1, path.read_bytes()) for path in self._folder.glob(f"*{SUFFIX}")
        }
        self._loaded: dict[str, tuple[int, bool]] = {}

    def put_head(self, name: str, content: bytes) -> None:
        """Keep a head's file."""
        if self._heads.get(name, (0, None))[1] == content:
            return
        path = self._folder / f"{name}{SUFFIX}"
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
        self._heads[name] = (self._next(), content)

    def delete_head(self, name: str) -> None:
        """Delete a head's file."""
        (self._folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
        if name in self._heads:
            self._heads[name] = (self._next(), None)

    def set_loaded(self, model: str, loaded: bool) -> None:
        """Have all replicas load or unload a model."""
        self._loaded[model] = (self._next(), loaded)

    def since(self, version: int) -> Changes:
        """The changes after a version; those after 0 are everything."""
        if version == self._version:
            return Changes(version)
        return Changes(
            self._version,
            {name: content for name, (at, content) in self._heads.items() if at > version},
            {name: loaded for name, (at, loaded) in self._loaded.items() if at > version},
        )

    def _next(self) -> int:
        self._version += 1
        return self._version


def start_state(folder: Path) -> Any:
    """The cluster's state actor, which is started on this process's node unless it runs."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(State)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=here,
        )
        .remote(str(folder))
    )


def find_state() -> Any:
    """The running state actor."""
    return ray.get_actor(NAME, namespace=NAMESPACE)
