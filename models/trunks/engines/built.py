"""What engines share that build each pass, and run eagerly what they cannot build."""

import logging
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.device_errors import is_cuda_error, is_out_of_memory
from models.trunks.devices import DTYPES
from models.trunks.engines.auto import in_background
from models.trunks.engines.base import Engine, Pass, PassKey, PassSource, pass_key
from models.trunks.engines.comparison import compare, run_both
from models.trunks.engines.eager import Eager
from models.trunks.engines.report import Agreement, EngineReport
from models.trunks.features import PassPlan
from models.trunks.transfers import finish_writes

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-5
# More kinds of passes than these run eagerly: each one takes memory, and time to build.
MAX_PASSES = 8
# Photos that a pass of a precision that eager does not have is compared on.
PHOTOS = 8


class BuiltEngine(Engine):
    """A subclass has `build_pass`. A pass that cannot be built, or whose outputs differ from those
    of eager in the same precision by more than the tolerance (1e-5 of the largest value in
    float32), runs eagerly, with the reason in the report."""

    max_padded_queries = 64

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self._eager = Eager(source)
        self._agreements: dict[PassKey, Agreement] = {}
        self._reasons: dict[PassKey, str] = {}
        self._asked: set[PassKey] = set()
        self._asking = threading.Lock()

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        """A module's pass, built.

        Raises:
            Exception: it cannot be built.
        """
        raise NotImplementedError

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        try:
            if inputs[0].dim() == 2:
                raise EngineError("texts have many lengths")
            with torch.inference_mode():
                built = self.build_pass(key[0], module, inputs)
                self._agreements[key] = self._compare(built, module, inputs)
        except Exception as error:  # compilers raise errors of many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s runs a pass eagerly: %s", self.name, reason)
            self._reasons[key] = reason
            return self._eager.build(key, module, inputs)
        return built

    def prepare(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> None:
        """Build a pass before its first use, in the caller's thread.

        Raises:
            EngineError: it cannot be built in a precision that eager does not have.
        """
        super().prepare(plan, inputs)
        reason = self._reasons.get(self.key(plan, inputs))
        if reason is not None and not self._eager_has_precision:
            raise EngineError(reason)

    @property
    def _eager_has_precision(self) -> bool:
        return self.placement.precision in DTYPES

    def _compare(self, built: Pass, module: nn.Module, inputs: tuple[Tensor, ...]) -> Agreement:
        agreement = compare(self.source, run_both(module, built, self._examples(inputs)))
        tolerance = self.placement.tolerance
        if tolerance is None and self.placement.precision == "float32":
            tolerance = FLOAT32_TOLERANCE
        if tolerance is not None and agreement.largest_error > tolerance:
            raise EngineError(
                f"its outputs differ from eager by {agreement.largest_error:.1e} of the largest "
                f"value; the tolerance is {tolerance:.0e}"
            )
        return agreement

    def _examples(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """What a pass is compared on: its inputs, and photos if it has a precision of its own."""
        if self._eager_has_precision or len(inputs) > 1:
            return [inputs]
        like = inputs[0]
        photos = self.source.collate([*self.source.samples(PHOTOS), like[0].cpu()])[:PHOTOS]
        return [inputs, (photos.to(like.device),)]

    def run(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """Run a pass; eagerly until it is built, in the background unless `prepare` has done so."""
        key = pass_key(plan, inputs)
        if (built := self._passes.get(key)) is not None:
            try:
                return built(*inputs)
            except Exception as error:
                if is_out_of_memory(error) or is_cuda_error(error) or not self._eager_has_precision:
                    raise
                return self._replace(key, inputs, error)
        if self._is_new(key):
            with torch.inference_mode(False):  # of the kind that compiled programs are for
                copies = tuple(tensor.clone() for tensor in inputs)
            finish_writes(self.placement.device)
            in_background(self.get, plan, copies)
        return self._eager.run(plan, inputs)

    def _replace(
        self, key: PassKey, inputs: tuple[Tensor, ...], error: Exception
    ) -> Mapping[str, Tensor]:
        """Run a pass eagerly, from now on: what was built of it has failed."""
        plan, *_ = key
        outputs = self._eager.run(plan, inputs)  # raises if the inputs are at fault
        logger.warning("%s failed, and the pass runs eagerly: %s", self.name, error)
        self._reasons[key] = f"{self.name} failed: {str(error).partition(chr(10))[0]}"
        self._agreements.pop(key, None)
        self._passes[key] = lambda *tensors: self._eager.run(plan, tensors)
        return outputs

    def _is_new(self, key: PassKey) -> bool:
        """Whether nobody has asked for this pass before. Beyond MAX_PASSES none is new."""
        with self._asking:
            if key in self._asked or len(self._asked) >= MAX_PASSES:
                return False
            self._asked.add(key)
            return True

    @property
    def settled(self) -> bool:
        with self._asking:
            return self._asked <= self._passes.keys()

    def report(self) -> EngineReport:
        reason = next(iter(self._reasons.values()), "")
        agreements: Sequence[Agreement] = list(self._agreements.values())
        if not agreements:
            return EngineReport(Eager.name, reason=reason or f"{self.name} has built no pass yet")
        worst = max(agreements, key=lambda each: each.largest_error)
        return EngineReport(self.name, worst, reason)
