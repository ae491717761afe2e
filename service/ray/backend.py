"""The Backend over deployments of Ray Serve: requests go to the deployment of their trunks."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from models.catalog import Catalog
from models.description import ModelDescription
from service.ray.group import LOAD_TIMEOUT_S, Group, raise_error
from service.ray.heads import RayHeads
from service.ray.state import ask
from service.remote.merging import merge, run_all
from service.types import Call, Health, InferRequest, InferResult, ModelChanges

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 1.0


class RayBackend:
    """All trunk groups of a catalog, as one backend."""

    def __init__(self, catalog: Catalog, groups: Sequence[Group], state: Callable[[], Any]) -> None:
        """
        Args:
            groups: of all the catalog's models.
            state: returns the state actor.
        """
        self._catalog = catalog
        self._state = state
        self._groups = groups
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self.heads = RayHeads(groups, state)

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(_keep_refreshing(group)) for group in self._groups]

    def drain(self) -> None:
        self._closing = True

    async def close(self) -> None:
        self.drain()
        for task in self._tasks:
            task.cancel()

    def check_headers(self, model: str | None, *, bulk: bool, deadline: float) -> None:
        """Replicas refuse by themselves; a gateway does not know their queues."""

    async def infer(self, request: InferRequest) -> InferResult:
        calls = [self._with_model(call) for call in request.calls]
        parts: dict[Group, list[int]] = {}
        for position, call in enumerate(calls):
            parts.setdefault(self._group_of(call.model), []).append(position)
        if len(parts) == 1:
            return await next(iter(parts)).infer(replace(request, calls=calls))
        results = await run_all(
            group.infer(replace(request, calls=[calls[i] for i in places]))
            for group, places in parts.items()
        )
        return merge(len(calls), list(parts.values()), results)

    async def models(self, start: int = 0, count: int | None = None) -> Sequence[ModelDescription]:
        found = self._descriptions()
        names = dict.fromkeys([*(n for n in self._catalog.models if n in found), *found])
        end = None if count is None else start + count
        return [found[name] for name in islice(names, start, end)]

    async def changes(self, since: str) -> ModelChanges:
        """Always everything: replicas say what they have, not what has changed."""
        return ModelChanges("", await self.models(), (), reset=True)

    async def model(self, name: str) -> ModelDescription:
        if (model := self._descriptions().get(name)) is not None:
            return model
        description: ModelDescription = await self._group_of(name).one("describe", name)
        return description

    async def load(self, name: str) -> ModelDescription:
        return await self._everywhere("load", name, loaded=True)

    async def unload(self, name: str) -> ModelDescription:
        return await self._everywhere("unload", name, loaded=False)

    def knows(self, model: str) -> bool:
        return model in self._catalog.models or any(model in group.models for group in self._groups)

    def state(self) -> dict[str, Any]:
        return {
            "groups": {
                group.name: {
                    snapshot.replica: {
                        "ready": snapshot.health.ready,
                        "reasons": list(snapshot.health.reasons),
                    }
                    for snapshot in group.snapshots
                }
                for group in self._groups
            }
        }

    def health(self) -> Health:
        """Ready while every group's replicas are; live while the gateway can answer."""
        reasons = ["draining before exit"] if self._closing else []
        for group in self._groups:
            if not group.snapshots:
                reasons.append(f"trunk {group.name} has no replica yet")
            reasons += [
                f"replica {snapshot.replica}: {why}"
                for snapshot in group.snapshots
                for why in snapshot.health.reasons
            ]
        return Health(live=True, ready=not reasons, reasons=reasons)

    def _with_model(self, call: Call) -> Call:
        """The call with its model's name. The replica says what is wrong if there is none."""
        if call.model is not None:
            return call
        default = self._catalog.defaults.get(str(call.task))
        others = (m.name for m in self._descriptions().values() if call.task in m.default_for)
        return replace(call, model=default or next(others, None))

    def _group_of(self, model: str | None) -> Group:
        """The model's group, or any: its replicas say what is wrong."""
        entry = self._catalog.models.get(model or "")
        for group in self._groups:
            if entry.trunk in group.trunks if entry is not None else model in group.models:
                return group
        return self._groups[0]

    def _descriptions(self) -> Mapping[str, ModelDescription]:
        return {name: model for group in self._groups for name, model in group.models.items()}

    async def _everywhere(self, method: str, name: str, *, loaded: bool) -> ModelDescription:
        if self.knows(name):  # first, so that no replica applies an earlier state afterwards
            await ask(self._state, "set_loaded", name, loaded)
        group = self._group_of(name)
        for result in await group.every(method, name, timeout_s=LOAD_TIMEOUT_S):
            raise_error(result)
        return await self.model(name)


async def _keep_refreshing(group: Group) -> None:
    while True:
        try:
            await group.refresh()
        except Exception:
            logger.exception("the replicas of %s cannot be asked", group.name)
        await asyncio.sleep(REFRESH_INTERVAL_S)
