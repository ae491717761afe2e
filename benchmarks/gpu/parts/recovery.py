"""Whether batches recover after memory ran out."""

import asyncio

import numpy as np
import torch

from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.server import served
from service.types import Call

# Measurements in which the limit may grow again.
MAX_RUNS = 60


def recovery(options: Options) -> Rows:
    """Whether batches shrink when other memory is taken, and grow again once it is free."""
    if not options.is_gpu:
        yield {"refused": "needs a GPU; tests/service/test_device_loss.py has the policy"}
        return

    async def measure(network: str) -> Row:
        async with served(options, network, "eager", "float32") as server:
            queue = server.backend.batcher._scheduler.queues[network]
            item = np.zeros((3, *server.trunk.preprocess.input_size), np.float32)
            calls = [Call(network, None)]
            torch.cuda.empty_cache()
            before = queue.limit.value
            free, _ = torch.cuda.mem_get_info()
            taken = torch.empty(max(0, free - 2**28), dtype=torch.uint8, device=options.device)
            await server.run([item], [calls], options.clients, options.seconds)
            shrunk = queue.limit.value
            del taken
            torch.cuda.empty_cache()
            for _ in range(MAX_RUNS):  # the limit waits longer the oftener memory ran out
                await server.run([item], [calls], options.clients, options.seconds)
                if queue.limit.value > shrunk:
                    break
            return {"network": network, "shrunk_to": shrunk, "grown_to": queue.limit.value,
                    "holds": shrunk < before and shrunk < queue.limit.value}  # fmt: skip

    yield asyncio.run(measure(options.networks[0]))
