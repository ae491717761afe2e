"""Heads over all workers: uploads and deletions go to each, a fit to the least busy one."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from service.errors import NotFoundError, ServiceError, UnavailableError
from service.remote.worker import Worker
from service.stubs import vision_pb2 as pb
from service.types import FitRequest, HeadUpload

ORDER = ("ready", "loading", "fitting", "queued", "failed", "unloaded")


class RemoteHeads:
    """Workers that share a folder of heads have the same ones; others have what each was given."""

    def __init__(self, workers: Callable[[], Iterable[Worker]]) -> None:
        self._workers = workers

    async def all(self) -> Sequence[dict[str, Any]]:
        best: dict[str, dict[str, Any]] = {}
        for heads in await asyncio.gather(*(worker.heads() for worker in self._reachable())):
            for head in heads:
                known = best.setdefault(head["name"], head)
                if ORDER.index(head["state"]) < ORDER.index(known["state"]):
                    best[head["name"]] = head
        return list(best.values())

    async def get(self, name: str) -> dict[str, Any]:
        for head in await self.all():
            if head["name"] == name:
                if head["state"] == "ready":  # what is told to be ready must answer at once
                    await asyncio.gather(*(worker.learn() for worker in self._reachable()))
                return head
        raise NotFoundError(f"no head {name!r}", field="name")

    async def put(self, upload: HeadUpload) -> dict[str, Any]:
        request = pb.PutHeadRequest(
            name=upload.name,
            content=upload.content,
            trunk=upload.trunk or "",
            replace=upload.replace,
        )
        first, *others = self._reachable()
        await first.put_head(request)
        # where the folder is shared, they have it already
        request.replace = True
        await asyncio.gather(*(worker.put_head(request) for worker in others))
        return await self.get(upload.name)

    async def fit(self, request: FitRequest) -> dict[str, Any]:
        message = pb.FitHeadRequest(
            name=request.name,
            trunk=request.trunk,
            archive=request.archive,
            options=ParseDict(dict(request.options), Struct()),
            replace=request.replace,
        )
        able = [w for w in self._reachable() if w.has_trunk(request.trunk)] or self._reachable()
        await min(able, key=lambda worker: worker.outstanding).fit_head(message)
        return await self.get(request.name)

    async def delete(self, name: str) -> None:
        request = pb.DeleteHeadRequest(name=name)
        results = await asyncio.gather(
            *(worker.delete_head(request) for worker in self._reachable()), return_exceptions=True
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        missing = [error for error in errors if isinstance(error, NotFoundError)]
        if len(missing) == len(results) or len(missing) < len(errors):
            raise next((e for e in errors if e not in missing), errors[0])

    async def read(self, name: str, part: str) -> bytes:
        error: ServiceError = NotFoundError(f"no head {name!r}", field="name")
        for worker in self._reachable():
            try:
                return await worker.read_head(pb.ReadHeadRequest(name=name, part=part))
            except NotFoundError as missing:
                error = missing
        raise error

    def _reachable(self) -> list[Worker]:
        workers = [worker for worker in self._workers() if worker.up]
        if not workers:
            raise UnavailableError("no worker is within reach", retry_after_s=1)
        return workers
