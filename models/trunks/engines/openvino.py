"""OpenVINO on CPUs, for trunks in float32.

A pass's module is traced and converted. The batch size, the length of texts and the number of query
tokens stay dynamic. Converted passes are kept on disk; a second start reads them.
https://docs.openvino.ai
"""

import hashlib
import threading
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.engines.base import Engine, EngineReport, Pass, PassKey, largest_error

TOLERANCE = 1e-5
# where a model keeps its outputs' names: one tensor may be two outputs
NAMES = ["vitrail", "outputs"]
LIBRARIES = ("openvino", "torch", "timm")


class OpenVino(Engine):
    name = "openvino"
    single_group = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reports: dict[PassKey, EngineReport] = {}

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        placement = self.placement
        if placement.device.type != "cpu" or placement.dtype != torch.float32:
            raise EngineError(
                f"openvino runs float32 on CPUs, not {placement.dtype} on {placement.device.type}"
            )
        model = self._convert(key, module, inputs)
        try:
            built = CompiledPass(model, placement.threads, placement.streams)
            error = max(largest_error(module, built, example) for example in _examples(inputs))
        except RuntimeError as failure:
            raise EngineError(f"openvino cannot run it: {_first_line(failure)}") from failure
        if not error <= TOLERANCE:
            raise EngineError(
                f"its outputs differ from eager by {error:.1e} of the largest value; the tolerance "
                f"is {TOLERANCE:.0e}"
            )
        self._reports[key] = EngineReport(self.name, error, len(inputs[0]))
        return built

    def report(self) -> EngineReport:
        worst = max(self._reports.values(), key=lambda report: report.error or 0.0, default=None)
        return worst or EngineReport(self.name)

    def is_cached(self, key: PassKey) -> bool:
        """Whether the converted pass only has to be read from disk."""
        path = self._path(key)
        return path is not None and path.is_file()

    def _convert(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """The pass as an OpenVINO model that has the names of its outputs in its `NAMES`."""
        import openvino

        path = self._path(key)
        if path is not None and path.is_file():
            return openvino.Core().read_model(path)
        flat = FlatModule(module)
        try:
            # inference tensors cannot be traced
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                inputs = tuple(tensor.clone() for tensor in inputs)
                warnings.simplefilter("ignore")  # of tracing: the comparison with eager decides
                model = openvino.convert_model(flat, example_input=inputs)
        except Exception as error:  # the converter raises errors of many kinds
            raise EngineError(f"openvino cannot convert it: {_first_line(error)}") from error
        model.set_rt_info(",".join(flat.names), NAMES)
        if path is not None:
            _save(openvino, model, path)
        return model

    def _path(self, key: PassKey) -> Path | None:
        if self.placement.cache is None:
            return None
        plan, dtypes, sizes = key
        versions = [f"{name} {version(name)}" for name in LIBRARIES]
        fields = sorted((name, str(sorted(value) if isinstance(value, frozenset) else value))
                        for name, value in plan_fields(plan).items())  # fmt: skip
        text = repr((self.identity, versions, fields, dtypes, sizes))
        return self.placement.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.xml"


class CompiledPass:
    """A compiled model, called from any thread with tensors on the CPU."""

    def __init__(self, model: Any, threads: int, streams: int) -> None:
        import openvino

        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": max(1, streams),
            **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
        }
        self._compiled = openvino.Core().compile_model(model, "CPU", config)
        self._names = str(model.get_rt_info(NAMES).value).split(",")
        self._local = threading.local()

    def __call__(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        results = request.infer(arrays, share_inputs=True)
        return {name: torch.from_numpy(results[number]) for number, name in enumerate(self._names)}


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


def _examples(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs that a built pass is compared on: all, one row, and shorter texts."""
    if len(inputs) > 1:  # rows of query tokens cannot be cut
        return [inputs]
    [batch] = inputs
    examples = [inputs, (batch[:1].contiguous(),)]
    if batch.dim() == 2 and not batch.is_floating_point():
        examples.append((batch[:, : batch.shape[1] // 2 + 1].contiguous(),))
    return examples


def _save(openvino: Any, model: Any, path: Path) -> None:
    """Write both files of a model; it is in the cache only once its second one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}-{threading.get_native_id()}.xml")
    openvino.save_model(model, temporary, compress_to_fp16=False)
    temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
    temporary.replace(path)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
