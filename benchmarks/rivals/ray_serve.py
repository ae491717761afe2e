"""Ray Serve with its batching decorator. A thread computes, so that the replica keeps reading.

https://docs.ray.io/en/latest/serve
"""

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.rivals.classifier import Answer, Classifier
from benchmarks.rivals.forms import read_images
from benchmarks.rivals.options import Options

OPTIONS = Options.from_environment()


class Service:
    def __init__(self) -> None:
        self.classifier = Classifier(OPTIONS)
        self.thread = ThreadPoolExecutor(1)

    @serve.batch(max_batch_size=OPTIONS.max_requests, batch_wait_timeout_s=OPTIONS.wait_ms / 1e3)
    async def classify(self, requests: list[list[bytes]]) -> list[Answer]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, self.classifier.classify, requests)

    async def __call__(self, request: Request) -> dict[str, Answer]:
        if request.method == "GET":  # readiness
            return {}
        return {"results": await self.classify(await read_images(request))}


if __name__ == "__main__":
    passed = ("RIVAL_", "MALLOC_", "OMP_", "PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name.startswith(passed)}
    ray.init(
        num_cpus=2 * OPTIONS.workers,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        runtime_env={"env_vars": variables},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": OPTIONS.port, "request_timeout_s": 120})
    deployment = serve.deployment(
        num_replicas=OPTIONS.workers, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5}
    )(Service)
    serve.run(deployment.bind(), route_prefix="/")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
