"""Whether a pass waits for the device, by CUDA's own account."""

import torch

from benchmarks.gpu.networks import blank_batch, classifier, load_trunk
from benchmarks.gpu.options import Options, Rows
from models.errors import ModelsError
from models.inference import start_pass
from models.trunks.compute_stream import compute_stream


def waiting(options: Options) -> Rows:
    """Whether a pass waits for the device, by CUDA's own account."""
    if not options.is_gpu:
        yield {"refused": "only CUDA can tell; tests/models/test_no_waiting.py looks at the code"}
        return
    for network, precision, engine in options.combinations():
        try:
            trunk = load_trunk(options, network, engine, precision)
        except ModelsError:
            continue
        batch = blank_batch(trunk, 4).pin_memory()
        calls = [[classifier(trunk)] for _ in range(4)]
        start_pass(trunk, batch, calls)  # builds
        row = {"network": network, "precision": precision, "engine": engine}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with compute_stream(options.device).use():
                moved = batch.to(options.device, non_blocking=True)
                started = start_pass(trunk, moved, calls)
            if failed := started.errors():
                raise failed[0]
            yield {**row, "holds": True}
        except Exception as error:
            yield {**row, "holds": False, "reason": str(error)[:300]}
        finally:
            torch.cuda.set_sync_debug_mode("default")
