"""OpenVINO on CPUs, for trunks in float32.

A pass's module is traced and converted. The batch size, the length of texts and the number of query
tokens stay dynamic. Converted passes are kept on disk; a second start reads them.
https://docs.openvino.ai
"""

import hashlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement
from models.trunks.engines.base import Engine, EngineReport, Pass, PassKey, largest_error

# Without its telemetry, which would send events of every import and conversion to its vendor, each
# from a fork of this process. OpenVINO does without the package where it cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
# where a model keeps its outputs' names: one tensor may be two outputs
NAMES = ["vitrail", "outputs"]
LIBRARIES = ("vitrail", "openvino", "torch", "timm", "open_clip_torch", "transformers")


class OpenVino(Engine):
    name = "openvino"
    max_padded_queries = sys.maxsize

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reports: dict[PassKey, EngineReport] = {}
        self._failures: dict[PassKey, str] = {}

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        if (failure := self._failures.get(key)) is not None:
            raise EngineError(failure)
        try:
            return self._build(key, module, inputs)
        except EngineError as error:
            self._failures[key] = str(error)  # so that no later request converts in vain
            raise

    def _build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        placement = self.placement
        if placement.device.type != "cpu" or placement.dtype != torch.float32:
            raise EngineError(
                f"openvino runs float32 on CPUs, not {placement.dtype} on {placement.device.type}"
            )
        path = self._path(key)
        if path is not None and path.is_file():
            try:
                return self._compile(key, openvino.Core().read_model(path), module, inputs)
            except (EngineError, RuntimeError) as error:
                logger.warning("%s is converted again: %s", path, _first_line(error))
        model = _convert(module, inputs)
        built = self._compile(key, model, module, inputs)
        if path is not None:
            _save(model, path)
        return built

    def _compile(
        self, key: PassKey, model: Any, module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> Pass:
        """The compiled model, compared with eager."""
        placement = self.placement
        try:
            built = CompiledPass(model, placement)
            error = max(
                largest_error(module, partial(built.run, is_wide=is_wide), each)
                for each in _examples(module, inputs)
                for is_wide in (False, True)
            )
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
    """A compiled model, called from any thread with tensors on the CPU.

    A call takes as many threads as torch's operators would in the calling thread: one stream's
    share, or all of them.
    """

    def __init__(self, model: Any, placement: Placement) -> None:
        threads = placement.threads or len(os.sched_getaffinity(0))
        streams = max(1, min(placement.streams, threads))
        self._stream_threads = threads // streams
        self._narrow = self._wide = _compiled(model, threads, streams)
        if streams > 1:
            self._wide = _compiled(model, threads, 1)
        self._names = str(model.get_rt_info(NAMES).value).split(",")
        self._local = threading.local()

    def __call__(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        return self.run(*inputs, is_wide=torch.get_num_threads() > self._stream_threads)

    def run(self, *inputs: Tensor, is_wide: bool) -> Mapping[str, Tensor]:
        """Run on all threads, or on one stream's share of them."""
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        results = self._request(is_wide).infer(arrays, share_inputs=True)
        return {name: torch.from_numpy(results[number]) for number, name in enumerate(self._names)}

    def _request(self, is_wide: bool) -> Any:
        """This thread's own request, which holds the buffers of a call."""
        name = "wide" if is_wide else "narrow"
        if (request := getattr(self._local, name, None)) is None:
            compiled = self._wide if is_wide else self._narrow
            request = compiled.create_infer_request()
            setattr(self._local, name, request)
        return request


def _compiled(model: Any, threads: int, streams: int) -> Any:
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # A pinned thread would wait for its core while another program is busy there.
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(model, "CPU", config)


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


def _convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The pass as an OpenVINO model that has the names of its outputs in its `NAMES`."""
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
        except RuntimeError:  # texts of one length only
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
