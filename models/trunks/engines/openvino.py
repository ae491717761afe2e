"""OpenVINO on CPUs, for trunks whose weights are in float32.

A pass's module is traced and converted. The batch size, the length of texts and the number of query
tokens stay dynamic. Converted passes are kept on disk; a second start reads them. For bfloat16 and
float16 the compiled model alone computes in that precision. For int8 the converted model is
quantised. https://docs.openvino.ai
"""

import hashlib
import logging
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from models.errors import EngineError, InputError
from models.trunks.devices import Placement, Precision
from models.trunks.engines.base import Engine, Pass, PassKey, PassSource
from models.trunks.engines.comparison import compare, run_both
from models.trunks.engines.compiled_pass import NAMES, CompiledPass
from models.trunks.engines.quantization import check_calibration, quantize
from models.trunks.engines.report import Agreement, EngineReport

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-5
# The names of `OPTIMIZATION_CAPABILITIES`.
CAPABILITIES: Mapping[Precision, str] = {
    "float32": "FP32",
    "bfloat16": "BF16",
    "float16": "FP16",
    "int8": "INT8",
}
# Photos that a pass of another precision than float32 is compared on.
SAMPLES = 8
# Images that a pass is compared on at a time.
BATCH = 8
LIBRARIES = ("vitrail", "openvino", "torch", "timm", "open_clip_torch", "transformers")


class OpenVino(Engine):
    name = "openvino"
    max_padded_queries = sys.maxsize

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self._agreements: dict[PassKey, Agreement] = {}
        self._failures: dict[PassKey, str] = {}

    @classmethod
    def place(cls, placement: Placement) -> Placement:
        device, precision = placement.device.type, placement.precision
        if device != "cpu":
            raise EngineError(f"openvino runs on CPUs, not on {device}")
        if precision not in CAPABILITIES:
            raise EngineError(f"openvino does not compute in {precision} on CPUs")
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if CAPABILITIES[precision] not in capabilities:
            able = [name for name, flag in CAPABILITIES.items() if flag in capabilities]
            raise EngineError(
                f"this machine's CPU does not compute in {precision}; openvino can use "
                f"{', '.join(able)}"
            )
        if precision == "int8":
            check_calibration(placement)
        return replace(placement, dtype=torch.float32)

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        if (failure := self._failures.get(key)) is not None:
            raise EngineError(failure)
        try:
            return self._build(key, module, inputs)
        except EngineError as error:
            self._failures[key] = str(error)  # so that no later request converts in vain
            raise

    def _build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        path = self._path(key)
        if path is not None and path.is_file():
            try:
                return self._compile(key, openvino.Core().read_model(path), module, inputs)
            except (EngineError, RuntimeError) as error:
                logger.warning("%s is converted again: %s", path, _first_line(error))
        model = _convert(module, inputs)
        if self.placement.precision == "int8":
            model = self._quantize(model, module, inputs)
        built = self._compile(key, model, module, inputs)
        if path is not None:
            _save(model, path)
        return built

    def _quantize(self, model: Any, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if len(inputs) > 1:
            raise EngineError("query tokens have no calibration images for int8")
        names = model.get_rt_info(NAMES).value
        images, _ = self.source.calibration_inputs()
        quantized = quantize(model, module, self._collate(images, inputs[0]))
        quantized.set_rt_info(names, NAMES)
        return quantized

    def _compile(
        self, key: PassKey, model: Any, module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> Pass:
        """The compiled model, compared with eager."""
        try:
            built = CompiledPass(model, self.placement)
            agreement = self._compare(built, module, inputs)
        except RuntimeError as failure:
            raise EngineError(f"openvino cannot run it: {_first_line(failure)}") from failure
        tolerance = self.placement.tolerance
        if tolerance is None and self.placement.precision == "float32":
            tolerance = FLOAT32_TOLERANCE
        if tolerance is not None and not agreement.largest_error <= tolerance:
            raise EngineError(
                f"its outputs differ from eager float32 by {agreement.largest_error:.1e} of the "
                f"largest value; the tolerance is {tolerance:.0e}"
            )
        self._agreements[key] = agreement
        return built

    def _compare(
        self, built: "CompiledPass", module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> Agreement:
        """The agreement with eager on the inputs or, in other precisions than float32, on more
        photos. The largest error is that of either width and of all forms of inputs."""
        narrow, wide = (partial(built.run, is_wide=is_wide) for is_wide in (False, True))
        photos = self._photos(inputs)
        agreement = compare(self.source, run_both(module, narrow, photos or [inputs]))
        examples = [*photos, *_examples(module, inputs)]
        others = [compare(self.source, run_both(module, run, examples)) for run in (narrow, wide)]
        errors = [each.largest_error for each in (agreement, *others)]
        return replace(agreement, largest_error=max(errors))

    def _photos(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Batches of the package's photos, and of the images held out from calibration."""
        if self.placement.precision == "float32" or len(inputs) > 1:
            return []
        photos = list(self.source.samples(SAMPLES))
        if self.placement.precision == "int8":
            photos += self.source.calibration_inputs()[1]
        batch = self._collate(photos, inputs[0])
        return [(part,) for part in torch.split(batch, BATCH)]

    def _collate(self, images: Sequence[Tensor], like: Tensor) -> Tensor:
        """Prepared inputs as a batch of the same dtype as another one: uint8 or normalised."""
        return self.source.collate([*images, like[0]])[: len(images)]

    def report(self) -> EngineReport:
        agreements = list(self._agreements.values())
        worst = max(agreements, key=lambda each: each.largest_error, default=None)
        return EngineReport(self.name, worst)

    @property
    def nbytes(self) -> int:
        built = list(self._passes.values())
        return sum(each.nbytes for each in built if isinstance(each, CompiledPass))

    def is_cached(self, key: PassKey) -> bool:
        """Whether the converted pass only has to be read from disk."""
        path = self._path(key)
        return path is not None and path.is_file()

    def _path(self, key: PassKey) -> Path | None:
        if self.placement.cache is None:
            return None
        plan, dtypes, sizes = key
        versions = [f"{name} {version(name)}" for name in LIBRARIES]
        fields = sorted((name, str(sorted(value) if isinstance(value, frozenset) else value))
                        for name, value in plan_fields(plan).items())  # fmt: skip
        # In bfloat16 and float16 it is the same model as in float32, compiled in another way.
        precision = self.placement.precision_key if self.placement.precision == "int8" else ""
        text = repr((self.source.identity, versions, fields, dtypes, sizes, precision))
        return self.placement.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.xml"


class FlatModule(nn.Module):
    """A pass's module with its outputs as a tuple, which is what tracing takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names: list[str] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.module(*inputs)
        self.names = list(outputs)
        return tuple(outputs.values())


def plan_fields(plan: Any) -> dict[str, Any]:
    """A plan's fields by name."""
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


# torch.jit.trace keeps the module that it traces in a global of the process, as Python does with
# the filters of warnings.
_TRACING = threading.Lock()


def _convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The pass as an OpenVINO model that has the names of its outputs in its `NAMES`."""
    flat = FlatModule(module)
    try:
        # inference tensors cannot be traced
        with _TRACING, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            inputs = tuple(tensor.clone() for tensor in inputs)
            warnings.simplefilter("ignore")  # of tracing: the comparison with eager decides
            model = openvino.convert_model(flat, example_input=inputs)
    except Exception as error:  # the converter raises errors of many kinds
        raise EngineError(f"openvino cannot convert it: {_first_line(error)}") from error
    model.set_rt_info(",".join(flat.names), NAMES)
    return model


def _examples(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs that a built pass is compared on: all, one row, and shorter texts if the text
    tower takes them."""
    if len(inputs) > 1:  # rows of query tokens cannot be cut
        return [inputs]
    [batch] = inputs
    examples = [inputs, (batch[:1].contiguous(),)]
    if batch.dim() == 2 and not batch.is_floating_point():
        shorter = batch[:, : batch.shape[1] // 2 + 1].contiguous()
        try:
            module(shorter)
        except (RuntimeError, InputError):  # texts of one length only
            return examples
        examples.append((shorter,))
    return examples


def _save(model: Any, path: Path) -> None:
    """Write both files of a model; it counts as kept once the second one is there. A store that
    cannot be written costs the next start its time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            openvino.save_model(model, temporary, compress_to_fp16=False)
            temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
            temporary.replace(path)
    except (OSError, RuntimeError) as error:
        logger.warning("%s was not written: %s", path, error)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
