"""One deployment as the gateway sees it: its replicas' snapshots, and the requests sent to it."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from models.description import HeadDescription, ModelDescription
from service.clients import client
from service.errors import (
    LOADING_RETRY_AFTER_S,
    DeadlineExceededError,
    InternalError,
    ServiceError,
    UnavailableError,
)
from service.logs import request_id
from service.ray.groups import TrunkGroup
from service.ray.messages import Caller, Sent, Snapshot
from service.remote.descriptions import closeness
from service.types import InferRequest, InferResult

logger = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT_S = 5.0
# What changes models or heads. Loading is fetching weights, building and warming up.
ADMIN_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 900.0
# The replica answers at the deadline with what is done by then. This is for the answer to arrive.
ANSWER_MARGIN_S = 1.0
# How often a request is sent. One that kills its replicas costs no more than these.
ATTEMPTS = 2

LOST = (RayActorError, DeploymentUnavailableError, RayServeException)


class Group:
    """The handle of a group's deployment.

    Attributes:
        snapshots: of the running replicas, as of the last refresh.
        started: whether a replica has ever been reached.
    """

    def __init__(self, group: TrunkGroup, handle: Any) -> None:
        self.name = group.name
        self.trunks = group.trunks
        self.snapshots: Sequence[Snapshot] = ()
        self.started = False
        self._handle = handle
        self._refreshing = asyncio.Lock()

    async def infer(self, request: InferRequest) -> InferResult:
        """Run a request on the replica that Ray Serve chooses, and once more if it is lost.

        While there is no replica, the request waits for one until its deadline.

        Raises:
            ServiceError: the replica's own error, the deadline passed, or two replicas were lost.
        """
        self._check_started()
        for _ in range(ATTEMPTS):
            remaining_s = request.deadline - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineExceededError("the deadline passed before a replica answered")
            sent = Sent(request, remaining_s, caller())
            response = self._handle.infer.remote(sent)
            try:
                async with asyncio.timeout(remaining_s + ANSWER_MARGIN_S):
                    result: InferResult = raise_error(await response)
                    return result
            except TimeoutError as error:
                raise DeadlineExceededError(
                    "the deadline passed before a replica answered"
                ) from error
            except LOST as error:
                logger.warning("a replica of %s was lost: %s", self.name, type(error).__name__)
            except RayError as error:
                logger.error("a replica of %s failed: %s", self.name, error)
                raise InternalError("the worker failed") from error
            finally:
                response.cancel()  # does nothing to one that is done
        raise UnavailableError("two replicas were lost during the request", retry_after_s=1)

    def _check_started(self) -> None:
        if not self.started:
            raise UnavailableError(
                f"trunk {self.name!r} is loading", retry_after_s=LOADING_RETRY_AFTER_S
            )

    async def one(self, method: str, *arguments: Any, timeout_s: float = ADMIN_TIMEOUT_S) -> Any:
        """Call a method of one replica.

        Raises:
            ServiceError: the replica's own error, there is none, or it does not answer in time.
        """
        self._check_started()
        response = getattr(self._handle, method).remote(caller(), *arguments)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return raise_error(await response)
        except (TimeoutError, RayError, *LOST) as error:
            if limit.expired():
                raise DeadlineExceededError(
                    f"no replica of trunk {self.name!r} answered within {timeout_s:g} s"
                ) from error
            raise UnavailableError("a replica was lost during the request") from error
        finally:
            response.cancel()  # does nothing to one that is done

    async def every(
        self, method: str, *arguments: Any, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> list[Any]:
        """Call a method of every replica, and refresh their snapshots.

        Returns:
            Results, and the errors that replicas returned. Replicas that are lost are left out.

        Raises:
            ServiceError: there is no replica, or some do not answer in time. Those that did have
                done it.
        """
        self._check_started()
        broadcast = self._handle.broadcast(method, caller(), *arguments)
        try:
            results = await broadcast.results_async(timeout_s=timeout_s, return_exceptions=True)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"not every replica of trunk {self.name!r} answered within {timeout_s:g} s"
            ) from error
        except LOST as error:
            raise UnavailableError(
                f"trunk {self.name!r} has no replica", retry_after_s=1
            ) from error
        await self.refresh()
        return [result for result in results if not _is_lost(result)]

    async def refresh(self) -> None:
        """Update the snapshots. The last ones are kept if the replicas do not answer."""
        async with self._refreshing:
            broadcast = self._handle.broadcast("snapshot")
            try:
                results = await broadcast.results_async(
                    timeout_s=SNAPSHOT_TIMEOUT_S, return_exceptions=True
                )
            except (TimeoutError, *LOST):
                return
            self.snapshots = [result for result in results if isinstance(result, Snapshot)]
            self.started = self.started or bool(self.snapshots)

    @property
    def models(self) -> Mapping[str, ModelDescription]:
        """The models by name, each as the replica describes it that is furthest from answering:
        Ray Serve may choose any of them."""
        worst: dict[str, ModelDescription] = {}
        for model in (model for snapshot in self.snapshots for model in snapshot.models):
            worst[model.name] = max(worst.get(model.name, model), model, key=closeness)
        return worst

    @property
    def heads(self) -> Mapping[str, HeadDescription]:
        """The heads by name. One that is served by some replicas only is not ready yet."""
        found: dict[str, list[HeadDescription]] = {}
        for head in (head for snapshot in self.snapshots for head in snapshot.heads):
            found.setdefault(head.name, []).append(head)
        return {name: self._head(heads) for name, heads in found.items()}

    def _head(self, heads: Sequence[HeadDescription]) -> HeadDescription:
        head = min(heads, key=closeness)
        if head.is_ready and len(heads) < len(self.snapshots):
            return replace(head, state="loading")
        return head


def caller() -> Caller:
    """Who sends the current request."""
    return Caller(client.get(), request_id.get())


def raise_error(result: Any) -> Any:
    """The result of a replica's method; raises it if it is an error."""
    if isinstance(result, ServiceError):
        raise result
    return result


def _is_lost(result: Any) -> bool:
    return isinstance(result, BaseException) and not isinstance(result, ServiceError)
