"""Whether a request is worth its work: it takes places, and can be finished by its deadline.

The predicted finish is the work ahead of the request by its measured cost, decoding included. It is
compared with the deadline when the request comes and again before each input is decoded; the
scheduler compares a third time, before a batch. A request that cannot make it would only delay
those that can.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from models.inputs.types import Input, modality_of
from service.errors import (
    DeadlineExceededError,
    QueueFullError,
    ServiceError,
    UnavailableError,
)
from service.metrics import Metrics
from service.worker.batcher import Batcher
from service.worker.decode_queue import DecodeQueue
from service.worker.execution_plan import ExecutionPlan
from service.worker.places import QueueFull
from service.worker.trunk_keys import name_of

# A predicted finish must leave this much of the time to the deadline: costs vary.
MARGIN = 1.3
MIN_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Who asks for work, and until when.

    Args:
        client: an API key or an address; clients take turns.
        bulk: waits behind interactive requests.
        deadline: in `time.monotonic` seconds.
    """

    client: str = ""
    bulk: bool = False
    deadline: float = inf


class UnloadedError(UnavailableError):
    """A trunk that a request was planned for is no longer served. Perhaps another one is."""


class Admission:
    """Admits requests to the queues of decoding and of the trunks."""

    def __init__(self, batcher: Batcher, decoding: DecodeQueue, metrics: Metrics) -> None:
        self.batcher = batcher
        self.decoding = decoding
        self._metrics = metrics

    def admit(
        self, plans: Mapping[str, ExecutionPlan], inputs: Sequence[Input], claim: Claim
    ) -> None:
        """Take a place for every input in the queue of each of its passes, or none at all.

        Raises:
            DeadlineExceededError: the deadline has passed.
            QueueFullError: places are taken, or the request would not be finished in time.
            UnloadedError: a trunk was unloaded or replaced.
        """
        if claim.deadline <= time.monotonic():
            raise DeadlineExceededError("the deadline passed before the request was admitted")
        kinds = Counter(map(modality_of, inputs))
        counts: Counter[str] = Counter()
        for kind, plan in plans.items():
            for trunk_pass in plan.passes:
                counts[trunk_pass.key] += kinds[kind]
        self._check_finish(counts, kinds, claim)
        self.take_places(counts, claim)

    def check_headers(self, trunks: Sequence[str], claim: Claim) -> None:
        """Check what is known of a request before its body is read.

        Args:
            trunks: the keys of those that the request may need. It is refused only if one more
                image would be refused by each of them.

        Raises:
            DeadlineExceededError, QueueFullError: as `admit`.
        """
        if claim.deadline <= time.monotonic():
            raise DeadlineExceededError("the deadline passed before the body was read")
        one_image = {"image": 1}
        for trunk in trunks:
            counts = {trunk: 1}
            finish_s, remaining_s = self._finish(counts, one_image, claim)
            in_time = finish_s <= remaining_s
            if in_time and self.batcher.has_place(trunk, claim.client, bulk=claim.bulk):
                return
        if trunks:  # the last one says why
            self._check_finish(counts, one_image, claim)
            self.take_places(counts, claim)
            self.release(counts, claim)

    def check_decoding(self, plan: ExecutionPlan, kind: str, claim: Claim) -> None:
        """Check again that an input can be finished in time, before it is decoded.

        Raises:
            DeadlineExceededError: the deadline has passed.
            QueueFullError: the input would not be finished in time.
        """
        now = time.monotonic()
        if claim.deadline <= now:
            raise DeadlineExceededError("the deadline passed before the input was decoded")
        if claim.deadline == inf:
            return
        counts = Counter(trunk_pass.key for trunk_pass in plan.passes)
        ahead_s, own_s = self.batcher.forecast(counts, claim.client, bulk=claim.bulk, decoded=True)
        finish_s = max(ahead_s, self.decoding.seconds(kind)) + own_s
        if ahead_s and now + finish_s > claim.deadline:
            raise self._late(counts, finish_s, claim.deadline - now)

    def release(self, counts: Mapping[str, int], claim: Claim) -> None:
        """Give back places, by queue, of inputs that are not put."""
        for name, count in counts.items():
            self.batcher.release(name, count, claim.client, bulk=claim.bulk)

    def _check_finish(
        self, counts: Mapping[str, int], kinds: Mapping[str, int], claim: Claim
    ) -> None:
        finish_s, remaining_s = self._finish(counts, kinds, claim)
        if finish_s > remaining_s:
            raise self._late(counts, finish_s, remaining_s)

    def _finish(
        self, counts: Mapping[str, int], kinds: Mapping[str, int], claim: Claim
    ) -> tuple[float, float]:
        """Predicted seconds until further images are finished, and seconds to the deadline.

        Args:
            counts: the images of each queue.
            kinds: the inputs of each kind.
        """
        if claim.deadline == inf:
            return 0.0, inf
        remaining_s = claim.deadline - time.monotonic()
        ahead_s, own_s = self.batcher.forecast(counts, claim.client, bulk=claim.bulk)
        if not ahead_s:  # on an idle device, nothing but the work itself can tell
            return 0.0, remaining_s
        decode_s = sum(
            self.decoding.forecast(kind, count, claim.client, bulk=claim.bulk)
            for kind, count in kinds.items()
        )
        return (max(ahead_s, decode_s) + own_s) * MARGIN, remaining_s

    def _late(self, counts: Mapping[str, int], finish_s: float, remaining_s: float) -> ServiceError:
        self._count(counts, "late")
        return QueueFullError(
            f"the request would take {finish_s:.1f} s, and its deadline is in {remaining_s:.1f} s",
            retry_after_s=max(MIN_RETRY_AFTER_S, finish_s - remaining_s),
        )

    def take_places(self, counts: Mapping[str, int], claim: Claim) -> None:
        """Take places, by queue, or none at all.

        Raises:
            QueueFullError, UnloadedError: as `admit`.
        """
        taken: dict[str, int] = {}
        for name, count in counts.items():
            try:
                self.batcher.admit(name, count, claim.client, bulk=claim.bulk)
            except (QueueFull, KeyError) as error:
                self.release(taken, claim)
                raise self._refusal(name, error, counts) from error
            taken[name] = count

    def _refusal(self, trunk: str, error: Exception, counts: Mapping[str, int]) -> ServiceError:
        if isinstance(error, KeyError):
            return UnloadedError("the model is being unloaded", retry_after_s=1)
        self._count(counts, "full")
        wait_s = max(MIN_RETRY_AFTER_S, self.batcher.queue_seconds())
        return QueueFullError(f"{name_of(trunk)}: {error}", retry_after_s=wait_s)

    def _count(self, counts: Mapping[str, int], reason: str) -> None:
        for name, count in counts.items():
            self._metrics.refused.labels(name_of(name), reason).inc(count)
