"""Heads over all workers: uploads and deletions go to each worker, a fit to the least busy one."""

import asyncio
from collections.abc import Iterable, Sequence

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from models.description import HeadDescription
from service.errors import NotFoundError, ServiceError, UnavailableError
from service.remote.descriptions import closeness
from service.remote.worker import Worker
from service.stubs import vision_pb2 as pb
from service.types import FitRequest, HeadUpload


class RemoteHeads:
    """The heads of all workers.

    Workers that share a folder of heads have the same ones. Others have those sent to them.
    """

    def __init__(self, workers: Iterable[Worker]) -> None:
        self._workers = workers

    async def all(self) -> Sequence[HeadDescription]:
        return await self._find("")

    async def _find(self, name: str) -> Sequence[HeadDescription]:
        """All heads; with a name, at least that one if there is one."""
        heads = await asyncio.gather(*(worker.heads(name) for worker in self._reachable()))
        best: dict[str, HeadDescription] = {}
        for head in (head for of_one in heads for head in of_one):
            best[head.name] = min(best.get(head.name, head), head, key=closeness)
        return list(best.values())

    async def get(self, name: str) -> HeadDescription:
        for head in await self._find(name):
            if head.name == name:  # workers of earlier releases send all
                if head.is_ready:  # so that requests for it are routed at once
                    await asyncio.gather(*(worker.learn() for worker in self._reachable()))
                return head
        raise NotFoundError(f"no head {name!r}", field="name")

    async def put(self, upload: HeadUpload) -> HeadDescription:
        request = pb.PutHeadRequest(
            name=upload.name,
            content=upload.content,
            kind=upload.kind,
            trunk=upload.trunk or "",
            replace=upload.replace,
        )
        first, *others = self._reachable()
        await first.put_head(request)
        # workers that share the folder have it already
        request.replace = True
        await asyncio.gather(*(worker.put_head(request) for worker in others))
        return await self.get(upload.name)

    async def fit(self, request: FitRequest) -> HeadDescription:
        message = pb.FitHeadRequest(
            name=request.name,
            trunk=request.trunk,
            archive=request.archive,
            options=ParseDict(dict(request.options), Struct()),
            replace=request.replace,
        )
        workers = self._reachable()
        able = [worker for worker in workers if worker.has_trunk(request.trunk)]
        await min(able or workers, key=lambda worker: worker.outstanding).fit_head(message)
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
        workers = [worker for worker in self._workers if worker.up]
        if not workers:
            raise UnavailableError("no worker can be reached", retry_after_s=1)
        return workers
