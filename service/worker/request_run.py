"""One request in a worker, from its admission to its results.

An input goes from the decode pool to a lane by itself. The event loop is woken once for the results
of a batch, not for each step of each input.
"""

import asyncio
import contextvars
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from models.errors import ModelsError
from models.inference import HeadCall
from models.inputs.images import ImageLimits
from models.inputs.types import Input, modality_of
from models.trunks.jpeg_batch import RefusedJpegError
from service import tracing
from service.decoding.pool import ImageDecoder
from service.errors import DeadlineExceededError, InternalError, ServiceError, from_library
from service.metrics import Metrics
from service.types import ImageResult
from service.worker.admission import Admission, Claim
from service.worker.answer_memory import AnswerMemory
from service.worker.batch_queue import Entry
from service.worker.batcher import Batcher
from service.worker.decode_queue import Source
from service.worker.execution_plan import (
    ExecutionPlan,
    Prepared,
    TrunkPass,
    decode_all,
    prepare_all,
)
from service.worker.outbox import Outbox
from service.worker.postprocess import Decoded, finish_input, is_slow
from service.worker.runner import Done, Item, ItemResult
from service.worker.trunk_keys import name_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all requests of a worker share."""

    batcher: Batcher
    admission: Admission
    metrics: Metrics
    finishers: Executor
    limits: ImageLimits
    decoder: ImageDecoder
    outbox: Outbox
    answers: AnswerMemory


class RequestRun:
    """A request whose places in the queues are reserved.

    `start`, `expire`, `end` and `results` are called on the event loop. Inputs are decoded in the
    pool's threads, and their results come from the lanes' threads.
    """

    def __init__(
        self,
        shared: Shared,
        plans: Mapping[str, ExecutionPlan],
        inputs: Sequence[Input],
        claim: Claim,
    ) -> None:
        self.shared = shared
        self.is_ended = False
        self.trace = tracing.current()
        self._context = contextvars.copy_context()
        self._plans = plans
        self._claim = claim
        self._source = Source(
            claim.client, claim.bulk, modality_of(inputs[0]) if inputs else "",
            partial(self.within, self._decode_next), len(inputs),
        )  # fmt: skip
        self._undecoded = deque(enumerate(inputs))
        self._entries: list[Entry] = []
        self._results: list[ImageResult | None] = [None] * len(inputs)
        self._missing = len(inputs)
        self._done = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Decode and compute the inputs; returns when all results are there."""
        if self._missing:
            self.shared.admission.decoding.add(self._source)
            await self._done

    def expire(self) -> None:
        """Let the deadline be now: an event loop's timer may end some milliseconds before it, and
        what is dropped then counts as expired all the same."""
        self._claim = replace(self._claim, deadline=time.monotonic())
        for entry in self._entries:
            entry.deadline = self._claim.deadline

    def end(self) -> None:
        """Drop the inputs that have no result yet."""
        self.is_ended = True
        if not self._missing:
            return
        self.shared.admission.decoding.withdraw(self._source)
        with suppress(IndexError):  # a thread may take the last one meanwhile
            while True:
                _, item = self._undecoded.popleft()
                self._release(self._plans[modality_of(item)])
        self._drop_waiting()

    def results(self) -> list[ImageResult]:
        """The results of all inputs; those without one are past the deadline."""
        late = DeadlineExceededError("the deadline passed before the result was computed")
        return [result or ImageResult(error=late) for result in self._results]

    def deliver(self, position: int, result: ImageResult) -> None:
        """Hand in an input's result. May be called from any thread; only the first one counts."""
        self.shared.outbox.post(self._arrive, position, result)

    def within(self, work: Callable[[], None]) -> None:
        """Do work of this request in a thread, with the request's id in what it logs."""
        self._context.copy().run(work)

    def _arrive(self, position: int, result: ImageResult) -> None:
        if self._results[position] is None:
            self._results[position] = result
            self._missing -= 1
            if not self._missing and not self._done.done():
                self._done.set_result(None)

    # -- in the decode pool ----------------------------------------------------------------

    def _decode_next(self) -> None:
        try:
            position, item = self._undecoded.popleft()
        except IndexError:  # the request has ended meanwhile
            return
        plan = self._plans[modality_of(item)]
        try:
            entries = self._decode(position, item, plan)
        except Exception as error:
            self._release(plan)
            # without its frames, which refer to the input, and to the error by its result
            failure = _as_service_error(error).with_traceback(None)
            self.deliver(position, ImageResult(error=failure))
        else:
            self._put(plan.passes, entries)

    def _decode(self, position: int, item: Input, plan: ExecutionPlan) -> list[list[Entry]]:
        """The entries of an input's pieces, for each pass."""
        kind = modality_of(item)
        self.shared.admission.check_decoding(plan, kind, self._claim)
        started = time.monotonic()
        shared = self.shared
        prepared, size = prepare_all(item, plan.passes, shared.limits, shared.decoder)
        ended = time.monotonic()
        decode_s = ended - started
        tracing.add_stage("decode", self.trace, started, ended)
        self.shared.admission.decoding.measured(kind, decode_s)
        decoded = Decoded(item, size, decode_s)
        running = _RunningInput(self, position, plan, decoded, [len(each) for each in prepared])
        groups = []
        for number, (trunk_pass, pieces) in enumerate(zip(plan.passes, prepared, strict=True)):
            calls = [call.at_size(size) for call in trunk_pass.calls]
            groups.append(
                [
                    self._entry(trunk_pass, piece, calls, partial(running.done, number, place))
                    for place, piece in enumerate(pieces)
                ]
            )
            duration = self.shared.metrics.stage_duration.labels("decode", name_of(trunk_pass.key))
            duration.observe(decode_s, tracing.exemplar(self.trace))
        return groups

    def _entry(
        self, trunk_pass: TrunkPass, piece: Prepared, calls: Sequence[HeadCall], done: Done
    ) -> Entry:
        item = Item(trunk_pass.key, piece, calls, done, self.trace)
        return Entry(item, self, self._claim.bulk, self._claim.deadline, self._claim.client)

    def decode_again(self, item: Input, trunk_pass: TrunkPass, done: Done) -> None:
        """Have the CPU decode an image whose file the device has refused, and put it into its queue
        again. Called before the batch that had it ends: its queue is there until then."""
        self.shared.batcher.admit_again(trunk_pass.key, self._claim.client, bulk=self._claim.bulk)
        decode = partial(self.within, partial(self._decode_refused, item, trunk_pass, done))
        self.shared.admission.decoding.add(
            Source(self._claim.client, self._claim.bulk, modality_of(item), decode, 1)
        )

    def _decode_refused(self, item: Input, trunk_pass: TrunkPass, done: Done) -> None:
        shared = self.shared
        try:
            if self.is_ended:
                raise DeadlineExceededError("the request ended before the input was decoded")
            [[piece]], size = decode_all(item, [trunk_pass], shared.limits, shared.decoder)
        except Exception as error:
            shared.admission.release({trunk_pass.key: 1}, self._claim)
            done(_as_service_error(error).with_traceback(None))
            return
        calls = [call.at_size(size) for call in trunk_pass.calls]
        self._put([trunk_pass], [[self._entry(trunk_pass, piece, calls, done)]])

    def _put(self, passes: Sequence[TrunkPass], groups: Sequence[Sequence[Entry]]) -> None:
        self._entries += itertools.chain(*groups)
        for trunk_pass, entries in zip(passes, groups, strict=True):
            self.shared.batcher.put(trunk_pass.key, entries)
        if self.is_ended:  # `end` may have come before these entries were there
            self._drop_waiting()

    def _drop_waiting(self) -> None:
        for entry in self._entries:
            entry.cancelled = True
        for name in {entry.payload.trunk for entry in self._entries}:
            self.shared.batcher.sweep(name)

    def _release(self, plan: ExecutionPlan) -> None:
        """Give back the places of an input that was not put."""
        self.shared.admission.release({each.key: 1 for each in plan.passes}, self._claim)


class _RunningInput:
    """A decoded input, whose pieces are in the queues."""

    def __init__(
        self,
        run: RequestRun,
        position: int,
        plan: ExecutionPlan,
        decoded: Decoded,
        pieces: Sequence[int],
    ) -> None:
        """
        Args:
            pieces: the number of pieces in each pass.
        """
        self._run = run
        self._position = position
        self._plan = plan
        self._decoded = decoded
        # filled in any order; `finish_input` sees them when all are there
        self._results: list[list[Any]] = [[None] * count for count in pieces]
        self._ended = itertools.count(1)  # `next` is atomic: pieces end in several lanes
        self._total = sum(pieces)

    def done(self, number: int, place: int, result: ItemResult | Exception) -> None:
        """Take the result of a piece, by its pass and its place. The last one ends the input."""
        if isinstance(result, RefusedJpegError):
            again = partial(self.done, number, place)
            self._run.decode_again(self._decoded.item, self._plan.passes[number], again)
            return
        if isinstance(result, Exception):
            error = _as_service_error(result)
            self._run.deliver(self._position, ImageResult(error=error))
            return
        self._results[number][place] = result
        if next(self._ended) < self._total or self._run.is_ended:
            return
        if not is_slow(self._plan):
            self._run.within(self._finish)
            return
        rows = [row for pieces in self._results for piece in pieces for row in piece.rows]
        try:
            self._run.shared.answers.hold(rows)  # what waits takes memory, too
            self._run.shared.finishers.submit(self._run.within, self._finish)
        except ServiceError as error:
            self._run.deliver(self._position, ImageResult(error=error))

    def _finish(self) -> None:
        if self._run.is_ended:
            return
        shared, started = self._run.shared, time.monotonic()
        try:
            result = finish_input(
                self._plan, self._results, self._decoded, shared.limits, shared.metrics
            )
            shared.answers.hold(result.outputs)
        except Exception as error:
            result = ImageResult(error=_as_service_error(error))
        self._results.clear()  # the entries of the request refer to this until it ends
        tracing.add_stage("postprocess", self._run.trace, started, time.monotonic())
        self._run.deliver(self._position, result)


def _as_service_error(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ModelsError):
        return from_library(error)
    logger.error("an input failed", exc_info=error)
    return InternalError("the input could not be processed")
