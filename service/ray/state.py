"""What every replica must have beyond the catalog: heads, and models loaded or unloaded.

One actor of the cluster keeps it. Replicas ask it once a second what has changed since they last
asked, so that a replica which starts later gets the same heads.

Versions are of one start of the actor. Where it is started anew, perhaps on another node with an
empty folder, replicas get everything again and send it the heads that it lacks.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.errors import UnavailableError

NAME, NAMESPACE = "vitrail-state", "vitrail"
SUFFIX = ".safetensors"
# How long the actor may take to answer. It answers at once unless it or its node is restarting.
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Version:
    """A state of the actor.

    Args:
        epoch: of one start of the actor; "" before all.
        number: of its changes, from 1.
    """

    epoch: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed since a version.

    Args:
        heads: the content of their files by name; None for deleted ones.
        loaded: whether models are to be loaded.
        reset: the version was none of this start of the actor, so these are all that it has.
    """

    version: Version
    heads: dict[str, bytes | None] = field(default_factory=dict)
    loaded: dict[str, bool] = field(default_factory=dict)
    reset: bool = False


class State:
    """The actor's state. Heads are also files in a folder of its node, as `vitrail serve` has."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._epoch = secrets.token_hex(8)
        self._number = 1
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

    def since(self, version: Version) -> Changes:
        """The changes after a version; everything after one of another start of the actor."""
        reset = version.epoch != self._epoch
        after = 0 if reset else version.number
        return Changes(
            Version(self._epoch, self._number),
            {name: content for name, (at, content) in self._heads.items() if at > after},
            {name: loaded for name, (at, loaded) in self._loaded.items() if at > after},
            reset,
        )

    def _next(self) -> int:
        self._number += 1
        return self._number


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


async def ask(find: Callable[[], Any], method: str, *arguments: Any) -> Any:
    """The answer of the state actor.

    Args:
        find: returns the actor.

    Raises:
        UnavailableError: it does not answer.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await getattr(find(), method).remote(*arguments)
    except (TimeoutError, RayError, ValueError) as error:  # ValueError: there is no such actor
        raise UnavailableError(
            "the actor that keeps the cluster's heads does not answer", retry_after_s=5
        ) from error
