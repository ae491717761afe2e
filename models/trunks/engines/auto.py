"""Chooses an engine for each pass: the fastest one whose outputs agree with eager's.

A pass runs eagerly until another engine's version of it is built and compared with eager on real
inputs. Then both run the same batches a few times, in the thread that runs passes. The other engine
stays unless eager is clearly faster for most of them. The precisions other than float32 have no
such trials: the other engine runs what it can.
"""

import atexit
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakMethod

import torch
from torch import Tensor

from models.errors import EngineError
from models.trunks.devices import DTYPES, Placement
from models.trunks.engines.base import (
    Engine,
    Pass,
    PassKey,
    PassSource,
    pass_key,
)
from models.trunks.engines.eager import Eager
from models.trunks.engines.openvino import OpenVino
from models.trunks.engines.report import EngineReport
from models.trunks.features import PassPlan

logger = logging.getLogger(__name__)

# The engine that wins so many trials is chosen, so that a busy moment does not decide.
WINS = 5
# The candidate wins a trial in which it took up to so many times eager's time. On a near tie
# OpenVINO is better under load: its threads share out what is left of a pass, while OpenMP's wait
# at each barrier for the one that another thread displaced.
MARGIN = 1.1
# Images of many sizes would each need a graph of their own.
MAX_PASSES = 8
# How long an exit waits for the pass that is being built.
EXIT_WAIT_S = 20


@dataclass(slots=True)
class _Choice:
    """How one pass is run."""

    # The other engine's pass, once it is built.
    candidate: Pass | None = None
    # Whether the candidate won, for each batch that both ran.
    wins: list[bool] = field(default_factory=list)
    # Whether the candidate is used from now on.
    chosen: bool = False
    # Why the pass stays with eager.
    reason: str = ""


class Auto(Engine):
    name = "auto"
    # Padding is work for every row, so a row with more tokens than these is run eagerly instead.
    max_padded_queries = 16

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self._eager = Eager(source)
        self._other = OpenVino(source)
        self._choices: dict[PassKey, _Choice] = {}
        # Why the other engine runs no pass at all.
        self._refusal = ""
        try:
            OpenVino.place(source.placement)
        except EngineError as error:
            self._refusal = str(error)

    @classmethod
    def place(cls, placement: Placement) -> Placement:
        if placement.device.type == "cuda" and placement.precision not in DTYPES:
            raise EngineError(
                f"auto does not compute in {placement.precision} on GPUs: set engine = 'compile'"
            )
        try:
            return OpenVino.place(placement)
        except EngineError:
            if placement.precision not in DTYPES:
                raise
            return Eager.place(placement)

    def run(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        choice = self._choices.get(pass_key(plan, inputs))
        if choice is None:
            self._build_in_background(plan, inputs)
        # read once: another lane may give the candidate up meanwhile
        candidate = None if choice is None else choice.candidate
        if choice is None or candidate is None:
            return self._eager.run(plan, inputs)
        started = time.perf_counter()
        try:
            outputs = candidate(*inputs)
        except Exception as error:
            logger.warning("%s failed and is not used again: %s", self._other.name, error)
            self._give_up(choice, f"{self._other.name} failed: {error}")
            return self._eager.run(plan, inputs)
        if choice.chosen:
            return outputs
        between = time.perf_counter()
        outputs = self._eager.run(plan, inputs)
        self._count(choice, between - started, time.perf_counter() - between)
        return outputs

    def prepare(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> None:
        """Build the other engine's pass: now if it only has to be read from disk or the precision
        is not float32, otherwise in the background.

        Raises:
            EngineError: the pass cannot be built in a precision that eager does not have.
        """
        if self._is_float32 and not self._other.is_cached(pass_key(plan, inputs)):
            self._build_in_background(plan, inputs)
        elif (choice := self._new_choice(pass_key(plan, inputs))) is not None:
            self._build(choice, plan, inputs)
            if choice.reason and self.placement.precision not in DTYPES:
                raise EngineError(choice.reason)

    def report(self) -> EngineReport:
        choices = list(self._choices.values())
        if any(choice.chosen for choice in choices):
            return self._other.report()
        pending = self._refusal or f"{self._other.name} is not built and compared yet"
        reason = next((choice.reason for choice in choices if choice.reason), pending)
        return EngineReport(self._eager.name, reason=reason)

    @property
    def settled(self) -> bool:
        return all(choice.chosen or choice.reason for choice in list(self._choices.values()))

    @property
    def nbytes(self) -> int:
        return self._other.nbytes

    @property
    def _is_float32(self) -> bool:
        return self.placement.precision == "float32"

    def _new_choice(self, key: PassKey) -> _Choice | None:
        """The choice of a pass that is new and gets one. Passes beyond MAX_PASSES get none, nor do
        those whose rows differ in query tokens."""
        plan, *_ = key
        if self._refusal or len(plan.query_groups) > 1:
            return None
        with self._lock:
            if key in self._choices or len(self._choices) >= MAX_PASSES:
                return None
            choice = self._choices[key] = _Choice()
            return choice

    def _build_in_background(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> None:
        """Build with a copy of these inputs, which the pass is compared with eager on."""
        if (choice := self._new_choice(pass_key(plan, inputs))) is not None:
            copies = tuple(tensor.clone() for tensor in inputs)
            in_background(self._build, choice, plan, copies)

    def _build(self, choice: _Choice, plan: PassPlan, inputs: tuple[Tensor, ...]) -> None:
        try:
            choice.candidate = self._other.get(plan, inputs)
            choice.chosen = not self._is_float32
        except EngineError as error:
            choice.reason = str(error)
        except Exception as error:
            logger.exception("a pass of %s could not be built", self._other.name)
            choice.reason = f"{self._other.name}: {error}"

    def _count(self, choice: _Choice, candidate_s: float, eager_s: float) -> None:
        """Note a trial, in which both engines ran, and choose after some. The first one is not
        counted: the candidate allocates its buffers in it."""
        with self._lock:
            if choice.candidate is None or choice.chosen:  # decided by another lane
                return
            choice.wins.append(candidate_s <= MARGIN * eager_s)
            won = sum(choice.wins[1:])
            if max(won, len(choice.wins) - 1 - won) < WINS:
                return
            choice.chosen = won == WINS
        if not choice.chosen:
            self._give_up(choice, f"{self._other.name} is slower")

    def _give_up(self, choice: _Choice, reason: str) -> None:
        with self._lock:
            choice.candidate, choice.chosen, choice.reason = None, False, reason


@dataclass(frozen=True, slots=True)
class _Job:
    """A method to call, unless its object is gone."""

    method: "WeakMethod[Callable[..., object]]"
    arguments: tuple[object, ...]

    def run(self) -> None:
        if (method := self.method()) is not None:
            method(*self.arguments)


@cache
def _jobs() -> "queue.SimpleQueue[_Job | None]":
    """The jobs of the process's one background thread.

    An exit waits for the job that runs, up to EXIT_WAIT_S: a thread that the interpreter stops
    within OpenVINO's code aborts the process. It is a daemon, so that the exit waits no longer.
    """
    jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        while (job := jobs.get()) is not None:
            job.run()
            del job  # else its inputs are kept until the next job comes

    def stop() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                jobs.get_nowait()
        jobs.put(None)
        thread.join(EXIT_WAIT_S)

    thread = threading.Thread(target=work, name="engine-builder", daemon=True)
    thread.start()
    atexit.register(stop)
    return jobs


def in_background(method: Callable[..., object], *arguments: object) -> None:
    """Call a method in the background thread, after those before it. Nothing is called if its
    object is gone by then, as the engine of a trunk that was unloaded: it is not kept in memory."""
    _jobs().put(_Job(WeakMethod(method), arguments))
