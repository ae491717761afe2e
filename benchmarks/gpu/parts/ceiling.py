"""Forward only: what serving is compared with."""

from dataclasses import replace
from functools import partial

from benchmarks.gpu.networks import blank_batch, load_trunk
from benchmarks.gpu.options import Options, Rows
from benchmarks.gpu.timing import rate_of
from models.errors import ModelsError
from models.trunks.device_errors import is_out_of_memory


def ceiling(options: Options) -> Rows:
    """Forward only: images per second of one pass after another, with inputs on the device."""
    for network, precision, engine in options.combinations():
        row = {"network": network, "precision": precision, "engine": engine}
        try:
            trunk = load_trunk(options, network, engine, precision)
        except ModelsError as error:
            yield {**row, "refused": str(error)}
            continue
        report = trunk.engine.report()
        for batch in options.batches:
            pixels = blank_batch(trunk, batch).to(options.device)
            try:
                rate = rate_of(options, partial(trunk.forward, pixels), batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                yield {**row, "batch": batch, "refused": "out of memory"}
                break
            yield {**row, "ran": report.name, "batch": batch, "images_per_s": rate,
                   "agreement": report.to_json(), "reason": report.reason}  # fmt: skip


def quantised(options: Options) -> Rows:
    """Forward only in int8 and fp8, and how far they agree with float32."""
    if not options.is_gpu:
        yield {"refused": "needs a GPU; tests/models/test_gpu_quantization.py has the quantisation"}
        return
    if options.quick and "compile" not in options.engines:
        yield {"refused": "--quick compiles nothing; add --engines compile"}
        return
    yield from ceiling(replace(options, precisions=("int8", "fp8"), engines=("compile",)))
