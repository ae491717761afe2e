"""One worker of a gateway: its models, its health, and the images sent to it."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Set
from typing import Any

import grpc

from models.description import HeadDescription, ModelDescription, State, head_from_json
from service import tracing
from service.errors import (
    DeadlineExceededError,
    InternalError,
    PayloadTooLargeError,
    QueueFullError,
    UnavailableError,
)
from service.keys import worker_token
from service.remote.connection import Connection
from service.remote.ejection import Ejection
from service.remote.following import Follower
from service.remote.metrics import RemoteMetrics
from service.remote.models import WorkerModels, trunks_of
from service.remote.refusals import Refusals
from service.rpc.context import ERROR_KEY
from service.rpc.wire import from_error, from_response, to_request
from service.settings import Settings
from service.stubs import vision_pb2 as pb
from service.tls import WorkerCredentials
from service.types import Health, InferRequest, InferResult

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 5.0
DOWN_INTERVAL_S = 0.25
CLOSE_GRACE_S = 60.0
# The worker responds at the deadline with what is done by then. This is for the response to arrive.
RESPONSE_MARGIN_S = 1.0


class WorkerLostError(Exception):
    """The worker could not be reached, or disconnected before it responded."""


class Worker:
    """A channel to one address, probed until closed.

    Attributes:
        up: whether the last probe or call succeeded.
        outstanding: images sent and not yet answered.
        health: the worker's health, as of the last probe.
        ejected: true if its last requests all failed, so that others are preferred for a while.
        refusals: what it has refused just now.
    """

    def __init__(
        self,
        address: str,
        settings: Settings,
        metrics: RemoteMetrics,
        credentials: WorkerCredentials,
        on_change: Callable[[str], None],
        on_state: Callable[[], None],
        name: str = "",
    ) -> None:
        """
        Args:
            on_change: called with the name of each model of which something else is known now.
            on_state: called when the worker is lost, comes back, or begins or ceases to drain.
            name: the name that the worker's certificate must have; empty for that in the address.
        """
        self.address = address
        self.up = False
        self.outstanding = 0
        self._follower = Follower(self._list_models, on_change)
        self.health = Health(live=True, ready=False, reasons=("not reached yet",))
        self.ejected = Ejection(address)
        self.refusals = Refusals()
        self._closed = False
        self._on_state = on_state
        self._state = (self.up, self.health.draining)
        self._metrics = metrics
        self._connection = Connection(address, name, credentials, worker_token(settings))
        self._probe_now = asyncio.Event()
        self._prober = asyncio.create_task(self._probe())
        metrics.add_worker(address)

    @property
    def known(self) -> WorkerModels:
        """The worker's models, as of the last probe. They are kept while it is down."""
        return self._follower.known

    @property
    def models(self) -> Mapping[str, ModelDescription]:
        """The worker's models by name."""
        return self.known.by_name

    def has_ready(self, model: str) -> bool:
        """Whether the worker is up, and the model was ready at the last probe."""
        return self.up and model in self.models and self.models[model].is_ready

    def would_load(self, model: str) -> bool:
        """Whether the worker is up, and would load the model for a request."""
        known = self.models.get(model) if self.up else None
        return known is not None and known.state != State.READY and bool(known.on_demand)

    def has_version(self, model: str, digest: str | None) -> bool:
        """Whether the worker has the model ready, in the version of this digest."""
        return self.has_ready(model) and self.models[model].model_digest == digest

    def trunks_of(self, model: str | None) -> Set[str]:
        """The trunks that a request for a model may need; for any ready model if it is None."""
        if model is None:
            return self.known.trunks.keys()
        return trunks_of(self.models[model]) if self.has_ready(model) else frozenset()

    async def infer(self, request: InferRequest) -> InferResult:
        """Run a request on this worker.

        Raises:
            ServiceError: the worker's own error, or the deadline passed.
            WorkerLostError: it is lost. Another worker can run the request.
        """
        remaining_s = request.deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before a worker answered")
        images = max(1, len(request.inputs))
        self._add_outstanding(images)
        try:
            with tracing.calling("Predict", {"server.address": self.address}):
                result = from_response(
                    await self._connection.stub.Predict(
                        to_request(request, remaining_s),
                        timeout=remaining_s + RESPONSE_MARGIN_S,
                        metadata=self._connection.metadata(),
                    )
                )
        except grpc.aio.AioRpcError as error:
            translated = self._translate(error)
            if isinstance(translated, QueueFullError):
                self.refusals.add(request, self.models, remaining_s, translated)
            raise translated from error
        finally:
            self._add_outstanding(-images)
        self.ejected.update(result)
        return result

    async def load(self, model: str) -> None:
        """Load a model."""
        await self._admin(self._connection.stub.LoadModel, pb.LoadModelRequest(model=model))

    async def unload(self, model: str) -> None:
        """Unload a model."""
        await self._admin(self._connection.stub.UnloadModel, pb.UnloadModelRequest(model=model))

    def has_trunk(self, trunk: str) -> bool:
        """Whether a model on that trunk was ready at the last probe."""
        return trunk in self.known.trunks

    async def heads(self, name: str = "") -> list[HeadDescription]:
        """The worker's heads, or the one of that name if there is one."""
        request = pb.ListHeadsRequest(name=name)
        response = await self._answer(self._connection.stub.ListHeads, request)
        return [head_from_json(json.loads(head.description_json)) for head in response.heads]

    async def put_head(self, request: pb.PutHeadRequest) -> None:
        """Store a trained head and serve it."""
        await self._admin(self._connection.stub.PutHead, request)

    async def fit_head(self, request: pb.FitHeadRequest) -> None:
        """Start to fit a head."""
        await self._admin(self._connection.stub.FitHead, request)

    async def delete_head(self, request: pb.DeleteHeadRequest) -> None:
        """Delete a head, or cancel its fit."""
        await self._admin(self._connection.stub.DeleteHead, request)

    async def read_head(self, request: pb.ReadHeadRequest) -> bytes:
        """The content of a head's file."""
        content: bytes = (await self._answer(self._connection.stub.ReadHead, request)).content
        return content

    async def close(self) -> None:
        """Stop probing, and wait for the outstanding requests."""
        self._prober.cancel()
        self._closed = True
        self._metrics.remove_worker(self.address)
        await self._connection.close(0 if self.outstanding == 0 else CLOSE_GRACE_S)

    def _add_outstanding(self, images: int) -> None:
        self.outstanding += images
        if not self._closed:  # setting a gauge would create it again
            self._metrics.outstanding.labels(self.address).set(self.outstanding)

    async def learn(self) -> None:
        """Do a `refresh` for a request.

        Raises:
            UnavailableError: the worker is lost.
        """
        try:
            await self.refresh()
        except grpc.aio.AioRpcError as error:
            raise UnavailableError("a worker was lost during the request") from error

    async def _admin(self, method: Any, request: Any) -> None:
        await self._answer(method, request)
        await self.learn()

    async def _answer(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._connection.metadata())
        except grpc.aio.AioRpcError as error:
            try:
                raise self._translate(error) from error
            except WorkerLostError as lost:
                raise UnavailableError("a worker was lost during the request") from lost

    def _translate(self, error: grpc.aio.AioRpcError) -> Exception:
        """The worker's own error, or if it sent none, one by the gRPC status."""
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_KEY and isinstance(value, bytes):
                return from_error(pb.Error.FromString(value))
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceededError("the deadline passed before a worker answered")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return PayloadTooLargeError(f"the worker refused the message: {error.details()}")
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.UNKNOWN:
                self._lose(f"{error.code().name}: {error.details()}")
                return WorkerLostError(self.address)
            case _:
                logger.error("worker %s: %s %s", self.address, error.code(), error.details())
                return InternalError("the worker failed")

    def _lose(self, why: str) -> None:
        if self.up:
            logger.warning("worker %s is lost: %s", self.address, why)
        self._set_up(False)
        self._probe_now.set()

    def _set_up(self, up: bool) -> None:
        self.up = up
        if self._state != (state := (up, self.health.draining)):
            self._state = state
            self._on_state()
        if not self._closed:
            self._metrics.up.labels(self.address).set(up)

    async def _probe(self) -> None:
        """Refresh at intervals, and at once after a failed call."""
        while True:
            self._probe_now.clear()
            try:
                self._connection.renew()
                await self.refresh()
            except grpc.aio.AioRpcError as error:
                if self.up:
                    logger.warning("worker %s: %s %s", self.address, error.code(), error.details())
                reason = error.details() or error.code().name
                self.health = Health(live=True, ready=False, reasons=(reason,))
                self._set_up(False)
            except Exception:  # another kind of server, or an incompatible version
                logger.exception("worker %s sent an unexpected response", self.address)
                self._set_up(False)
            if not self.up:
                await asyncio.sleep(DOWN_INTERVAL_S)
                continue
            try:
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await self._probe_now.wait()
            except TimeoutError:
                pass

    async def refresh(self) -> None:
        """Update models and health.

        Raises:
            grpc.aio.AioRpcError: the worker cannot be reached.
        """
        response = await self._follower.refresh()
        if not self.up:
            logger.info("worker %s is up", self.address)
        self.health = Health(
            live=response.live,
            ready=response.ready,
            reasons=tuple(response.reasons),
            draining=response.draining,
        )
        self._set_up(True)

    async def _list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return await self._connection.stub.ListModels(
            request, timeout=PROBE_TIMEOUT_S, metadata=self._connection.metadata()
        )
