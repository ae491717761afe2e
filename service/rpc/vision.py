"""The Vision service: a backend's methods, by the names of the tasks."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from service.accounting import Account, counted
from service.errors import InvalidInputError, QueueFullError, ServiceError
from service.parameters import MAX_MODELS, validated_call
from service.rpc.context import Caller, Context, answering, check_count
from service.rpc.heads import HeadCalls
from service.rpc.wire import (
    from_call,
    from_inputs,
    from_options,
    to_error,
    to_model,
    to_response,
    to_task_response,
)
from service.stubs import vision_pb2 as pb
from service.types import Call, InferRequest, InferResult

STREAM_IN_FLIGHT = 32


class Vision(HeadCalls):
    async def Classify(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("classify", request, context)

    async def ZeroShot(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("zero-shot", request, context)

    async def Embed(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("embed", request, context)

    async def Segment(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("segment", request, context)

    async def Attention(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("attention", request, context)

    async def Reconstruct(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("reconstruct", request, context)

    async def Generate(self, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        return await self._task("generate", request, context)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        async with answering(self._deps, context, "Predict") as caller:
            if not 1 <= len(request.calls) <= MAX_MODELS:
                raise InvalidInputError(
                    f"{len(request.calls)} calls; there can be 1 to {MAX_MODELS}", field="calls"
                )
            calls = [from_call(call) for call in request.calls]
            result = await self._infer("predict", request, calls, caller)
            return to_response(result)

    async def EmbedStream(
        self, requests: AsyncIterator[pb.TaskRequest], context: Context
    ) -> AsyncIterator[pb.TaskResponse]:
        """Answers in order, with some requests in flight; while the queue is full, waits."""
        async with answering(self._deps, context, "EmbedStream") as caller:
            answers: asyncio.Queue[asyncio.Task[pb.TaskResponse] | None]
            answers = asyncio.Queue(STREAM_IN_FLIGHT)

            async def read() -> None:
                try:
                    async for request in requests:
                        task = asyncio.create_task(self._embed_patiently(request, caller))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                        await answers.put(task)
                except Exception:
                    await answers.put(None)
                    raise
                await answers.put(None)  # not when cancelled: nobody makes room any more

            tasks: set[asyncio.Task[object]] = set()
            tasks.add(reader := asyncio.create_task(read()))
            try:
                while (task := await answers.get()) is not None:
                    yield await task
                await reader
            finally:
                for unfinished in tasks:
                    unfinished.cancel()

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        async with answering(self._deps, context, "ListModels"):
            described = await self._deps.backend.models()
            health = self._deps.backend.health()
            return pb.ListModelsResponse(
                models=[to_model(model) for model in described],
                live=health.live,
                ready=health.ready,
                reasons=health.reasons,
            )

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        async with answering(self._deps, context, "LoadModel", admin=True):
            return pb.LoadModelResponse(
                model=to_model(await self._deps.backend.load(request.model))
            )

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        async with answering(self._deps, context, "UnloadModel", admin=True):
            described = await self._deps.backend.unload(request.model)
            return pb.UnloadModelResponse(model=to_model(described))

    async def _task(self, task: str, request: pb.TaskRequest, context: Context) -> pb.TaskResponse:
        async with answering(self._deps, context, task) as caller:
            return await self._answer_task(task, request, caller)

    async def _answer_task(
        self, task: str, request: pb.TaskRequest, caller: Caller
    ) -> pb.TaskResponse:
        options = from_options(request.options)
        if task == "generate" and options:
            raise InvalidInputError(
                "generate takes seeds or latents, and no options", field="options"
            )
        call = validated_call(request.model or None, task, options)
        return to_task_response(await self._infer(task, request, [call], caller))

    async def _embed_patiently(self, request: pb.TaskRequest, stream: Caller) -> pb.TaskResponse:
        """One request of a stream: its failure is its own answer, and ends nothing else."""
        caller = replace(stream, started=time.monotonic())
        try:
            deadline = caller.deadline(self._deps.settings, request.timeout_ms)
            while True:
                try:
                    return await self._answer_task("embed", request, caller)
                except QueueFullError as error:
                    wait_s = min(error.retry_after_s or 1, 1.0)
                    if time.monotonic() + wait_s >= deadline:
                        raise
                    await asyncio.sleep(wait_s)
        except ServiceError as error:
            count = len(request.images) + len(request.pixel_values) + len(request.texts)
            return pb.TaskResponse(results=[pb.Result(error=to_error(error))] * max(1, count))

    async def _infer(
        self,
        name: str,
        request: pb.TaskRequest | pb.PredictRequest,
        calls: Sequence[Call],
        caller: Caller,
    ) -> InferResult:
        deps = self._deps
        if caller.is_gateway:
            return await self._ask(request, calls, caller, Account())
        with counted(deps.metrics, deps.backend.knows, name, caller.started) as account:
            result = await self._ask(request, calls, caller, account)
            account.answered(result)
            result.raise_if_all_failed()
            return result

    async def _ask(
        self,
        request: pb.TaskRequest | pb.PredictRequest,
        calls: Sequence[Call],
        caller: Caller,
        account: Account,
    ) -> InferResult:
        account.models = [call.model or "" for call in calls]
        inputs = from_inputs(request)
        if not inputs and not caller.is_gateway:
            raise InvalidInputError("the request holds nothing to answer about", field="images")
        check_count(self._deps.settings, len(inputs))
        account.deadline = caller.deadline(self._deps.settings, request.timeout_ms)
        wanted = InferRequest(
            inputs=inputs,
            calls=calls,
            deadline=account.deadline,
            bulk=request.priority == pb.PRIORITY_BULK,
        )
        return await self._deps.backend.infer(wanted)
