"""Heads over all replicas. Uploads reach the running ones at once, and later ones by the state."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from models.description import HeadDescription
from service.errors import NotFoundError, ServiceError, UnavailableError
from service.head_file import trunk_of
from service.ray.group import Group, raise_error
from service.ray.state import ask
from service.types import FitRequest, HeadUpload


class RayHeads:
    """The heads of all groups."""

    def __init__(self, groups: Sequence[Group], state: Callable[[], Any]) -> None:
        self._groups = groups
        self._state = state

    async def all(self) -> Sequence[HeadDescription]:
        return [head for group in self._groups for head in group.heads.values()]

    async def get(self, name: str) -> HeadDescription:
        group = self._group_of(name)
        await group.refresh()
        if (head := group.heads.get(name)) is None:
            raise NotFoundError(f"no head {name!r}", field="name")
        return head

    async def put(self, upload: HeadUpload) -> HeadDescription:
        trunk = await asyncio.to_thread(lambda: upload.trunk or trunk_of(upload.content))
        group = self._group_with(trunk)
        content = _first(await group.every("put_head", upload))
        await ask(self._state, "put_head", upload.name, content)
        return await self.get(upload.name)

    async def fit(self, request: FitRequest) -> HeadDescription:
        group = self._group_with(request.trunk)
        await group.one("fit_head", request)
        return await self.get(request.name)

    async def delete(self, name: str) -> None:
        group = self._group_of(name)
        results = _answers(await group.every("delete_head", name))
        missing = [result for result in results if isinstance(result, NotFoundError)]
        errors = [result for result in results if isinstance(result, ServiceError)]
        if len(missing) == len(results) or len(missing) < len(errors):
            raise next((e for e in errors if e not in missing), errors[0])
        await ask(self._state, "delete_head", name)

    async def read(self, name: str, part: str) -> bytes:
        results = await self._group_of(name).every("read_head", name, part)
        content: bytes = _first(sorted(results, key=lambda r: isinstance(r, ServiceError)))
        return content

    def _group_of(self, head: str) -> Group:
        return next((g for g in self._groups if head in g.heads), self._groups[0])

    def _group_with(self, trunk: str) -> Group:
        """The trunk's group, or any: its replicas say what is wrong."""
        return next((g for g in self._groups if trunk in g.trunks), self._groups[0])


def _first(results: Sequence[Any]) -> Any:
    """The first result, unless a replica returned an error."""
    return raise_error(_answers(results)[0])


def _answers(results: Sequence[Any]) -> Sequence[Any]:
    """The results of replicas. Raises `UnavailableError` if no replica answered."""
    if not results:
        raise UnavailableError("no replica answered", retry_after_s=1)
    return results
