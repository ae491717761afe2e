"""BentoML with adaptive batching. A batchable endpoint takes lists. https://docs.bentoml.com"""

import os
import sys
from typing import Any

import bentoml
from PIL.Image import Image

from benchmarks.rivals.classifier import Classifier
from benchmarks.rivals.options import Options

OPTIONS = Options.from_environment()


@bentoml.service(workers=OPTIONS.workers, traffic={"timeout": 120, "max_concurrency": 512})
class Service:
    def __init__(self) -> None:
        self.classifier = Classifier(OPTIONS)

    # `max_latency_ms` is a deadline: requests that BentoML expects to miss it are answered 503.
    @bentoml.api(
        route="/predict",
        batchable=True,
        max_batch_size=max(OPTIONS.max_batch, OPTIONS.images),
        max_latency_ms=60_000,
    )
    def predict(self, images: list[Image]) -> list[list[dict[str, Any]]]:
        pixels = [self.classifier.prepare(image) for image in images]
        return self.classifier.forward(pixels)


if __name__ == "__main__":
    service = "benchmarks.rivals.bentoml:Service"
    address = ["--host", "127.0.0.1", "--port", str(OPTIONS.port)]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", service, *address])
