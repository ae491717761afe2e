"""A compiled OpenVINO model as a pass."""

import os
import threading
from collections.abc import Mapping
from typing import Any

import openvino
import torch
from torch import Tensor

from models.trunks.devices import Placement, Precision, one_thread

# where a model keeps its outputs' names: one tensor may be two outputs
NAMES = ["vitrail", "outputs"]
# What a compiled model computes in, by precision. What int8 leaves in float stays float32.
HINTS: Mapping[Precision, str] = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "f32",
}


class CompiledPass:
    """A compiled model, called from any thread with tensors on the CPU.

    A call takes as many threads as torch's operators would in the calling thread: one stream's
    share, or all of them.
    """

    def __init__(self, model: Any, placement: Placement) -> None:
        threads = placement.threads or len(os.sched_getaffinity(0))
        streams = max(1, min(placement.streams, threads))
        self._stream_threads = threads // streams
        hint = HINTS[placement.precision]
        self._narrow = self._wide = _compiled(model, hint, threads, streams)
        if streams > 1:
            self._wide = _compiled(model, hint, threads, 1)
        self.nbytes = (1 + (streams > 1)) * _constant_bytes(model)
        self._names = str(model.get_rt_info(NAMES).value).split(",")
        self._local = threading.local()

    def __call__(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        is_wide = torch.get_num_threads() > self._stream_threads
        # OpenVINO's threads compute; torch only copies.
        with one_thread():
            return self.run(*inputs, is_wide=is_wide)

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


def _compiled(model: Any, hint: str, threads: int, streams: int) -> Any:
    config = {
        "INFERENCE_PRECISION_HINT": hint,
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # A pinned thread would wait for its core while another program is busy there.
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(model, "CPU", config)


def _constant_bytes(model: Any) -> int:
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants)
