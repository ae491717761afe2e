"""The methods of the Vision service that list, add, fit and delete heads."""

from collections.abc import Sequence

from models.description import HeadDescription
from service.errors import NotFoundError
from service.parameters import FitParameters, validate
from service.rpc.context import Context, Deps, handle_call
from service.rpc.wire import from_options, to_model
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionServicer
from service.types import FitRequest, HeadUpload


class HeadCalls(VisionServicer):
    """The part of the servicer for heads."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    async def ListHeads(
        self, request: pb.ListHeadsRequest, context: Context
    ) -> pb.ListHeadsResponse:
        async with handle_call(self._deps, context, "ListHeads"):
            heads = await self._heads(request.name)
            return pb.ListHeadsResponse(heads=[to_model(head) for head in heads])

    async def _heads(self, name: str) -> Sequence[HeadDescription]:
        if not name:
            return await self._deps.backend.heads.all()
        try:
            return [await self._deps.backend.heads.get(name)]
        except NotFoundError:
            return []

    async def PutHead(self, request: pb.PutHeadRequest, context: Context) -> pb.PutHeadResponse:
        async with handle_call(self._deps, context, "PutHead", scope="heads"):
            upload = HeadUpload(
                name=request.name,
                content=request.content,
                kind=request.kind,
                trunk=request.trunk or None,
                replace=request.replace,
            )
            return pb.PutHeadResponse(head=to_model(await self._deps.backend.heads.put(upload)))

    async def FitHead(self, request: pb.FitHeadRequest, context: Context) -> pb.FitHeadResponse:
        async with handle_call(self._deps, context, "FitHead", scope="heads"):
            options = validate(FitParameters, from_options(request.options))
            fit = FitRequest(
                name=request.name,
                trunk=request.trunk,
                archive=request.archive,
                options=options.model_dump(exclude_none=True),
                replace=request.replace,
            )
            return pb.FitHeadResponse(head=to_model(await self._deps.backend.heads.fit(fit)))

    async def DeleteHead(
        self, request: pb.DeleteHeadRequest, context: Context
    ) -> pb.DeleteHeadResponse:
        async with handle_call(self._deps, context, "DeleteHead", scope="heads"):
            await self._deps.backend.heads.delete(request.name)
            return pb.DeleteHeadResponse()

    async def ReadHead(self, request: pb.ReadHeadRequest, context: Context) -> pb.ReadHeadResponse:
        async with handle_call(self._deps, context, "ReadHead"):
            content = await self._deps.backend.heads.read(request.name, request.part)
            return pb.ReadHeadResponse(content=content)
