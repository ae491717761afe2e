"""The Vision service: inference, and loading and listing models."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial

from models.tasks.table import tasks
from service.accounting import Account, counted
from service.errors import InvalidInputError, ServiceError
from service.limits import check_input_count
from service.parameters import MAX_MODELS
from service.rpc.context import Caller, Context, handle_call
from service.rpc.heads import HeadCalls
from service.rpc.streams import in_order, infer
from service.rpc.wire import (
    Request,
    count_inputs,
    from_call,
    from_inputs,
    to_error,
    to_model,
    to_response,
    to_task_response,
)
from service.stubs import vision_pb2 as pb
from service.types import Call, InferRequest, InferResult, ModelChanges

OneModelRequest = pb.TaskRequest | pb.InferRequest


class Vision(HeadCalls):
    """The servicer. The method of a task is `Infer` with the task's name."""

    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.TaskResponse:
        async with handle_call(self._deps, context, "Infer", task="infer") as caller:
            return await self._infer_task(request.task, request, caller)

    async def Classify(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("classify", request, context)

    async def ZeroShot(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("zero-shot", request, context)

    async def Embed(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("embed", request, context)

    async def Segment(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("segment", request, context)

    async def Attention(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("attention", request, context)

    async def Reconstruct(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("reconstruct", request, context)

    async def Generate(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._run_task("generate", request, context)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        async with handle_call(self._deps, context, "Predict", task="predict") as caller:
            if not 1 <= len(request.calls) <= MAX_MODELS:
                raise InvalidInputError(
                    f"{len(request.calls)} calls; there can be 1 to {MAX_MODELS}", field="calls"
                )
            calls = [from_call(call.model, call.task, call.options) for call in request.calls]
            return to_response(await self._infer("predict", request, calls, caller))

    async def EmbedStream(
        self, requests: AsyncIterator[pb.TaskRequest], context: Context
    ) -> AsyncIterator[pb.TaskResponse]:
        """Embed what comes. Requests wait while the queue is full."""
        async with handle_call(self._deps, context, "EmbedStream") as caller:
            answers = in_order(requests, partial(self._embed, stream=caller))
            async with aclosing(answers):
                async for answer in answers:
                    yield answer

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        async with handle_call(self._deps, context, "ListModels"):
            backend = self._deps.backend
            if request.HasField("since"):
                changes = await backend.changes(request.since)
            else:
                changes = ModelChanges("", await backend.models(), (), reset=True)
            health = backend.health()
            return pb.ListModelsResponse(
                models=[to_model(model) for model in changes.models],
                live=health.live,
                ready=health.ready,
                reasons=health.reasons,
                draining=health.draining,
                version=changes.version,
                removed=changes.removed,
                reset=changes.reset,
                more=changes.more,
            )

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        async with handle_call(self._deps, context, "LoadModel", scope="admin"):
            return pb.LoadModelResponse(
                model=to_model(await self._deps.backend.load(request.model))
            )

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        async with handle_call(self._deps, context, "UnloadModel", scope="admin"):
            return pb.UnloadModelResponse(
                model=to_model(await self._deps.backend.unload(request.model))
            )

    async def _run_task(
        self, task: str, request: OneModelRequest, context: Context
    ) -> pb.TaskResponse:
        async with handle_call(self._deps, context, task, task=task) as caller:
            return await self._infer_task(task, request, caller)

    async def _infer_task(
        self, task: str, request: OneModelRequest, caller: Caller
    ) -> pb.TaskResponse:
        if not task and not request.model:
            raise InvalidInputError("the request must name a task or a model", field="task")
        call = from_call(request.model, task, request.options)
        return to_task_response(await self._infer(_label(task), request, [call], caller))

    async def _embed(self, request: pb.TaskRequest, stream: Caller) -> pb.TaskResponse:
        """One request of a stream. If it fails, its results hold the error."""
        try:
            return await self._infer_task("embed", request, stream.next_request())
        except ServiceError as error:
            failed = pb.Result(error=to_error(error))
            return pb.TaskResponse(results=[failed] * max(1, count_inputs(request)))

    async def _infer(
        self, label: str, request: Request, calls: Sequence[Call], caller: Caller
    ) -> InferResult:
        """Run the calls, and count the request unless it is a gateway's, which counts it itself."""
        deps = self._deps
        if caller.is_gateway:
            return await self._send(request, calls, caller, Account())
        with counted(deps.metrics, deps.backend.knows, label, caller.started) as account:
            result = await self._send(request, calls, caller, account)
            account.answered(result)
            result.raise_if_all_failed()
            return result

    async def _send(
        self, request: Request, calls: Sequence[Call], caller: Caller, account: Account
    ) -> InferResult:
        account.models = [call.model or "" for call in calls]
        check_input_count(self._deps.settings, count_inputs(request))
        inputs = from_inputs(request)
        if not inputs and not caller.is_gateway:
            raise InvalidInputError("the request has no inputs", field="images")
        account.deadline = caller.deadline(self._deps.settings, request.timeout_ms)
        infer_request = InferRequest(
            inputs=inputs,
            calls=calls,
            deadline=account.deadline,
            bulk=request.priority == pb.PRIORITY_BULK,
        )
        return await infer(self._deps, caller, infer_request)


def _label(task: str) -> str:
    """The task's name in logs and metrics, whose labels must be bounded."""
    return task if task in tasks() else "infer"
