"""MLServer with adaptive batching; images come as base64 in the Open Inference Protocol.

https://mlserver.readthedocs.io
"""

import asyncio
import base64
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlserver
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.rivals.classifier import Classifier
from benchmarks.rivals.options import Options


class Runtime(mlserver.MLModel):
    async def load(self) -> bool:
        self.classifier = Classifier(Options.from_environment())
        self.thread = ThreadPoolExecutor(1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = list(payload.inputs[0].data)
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self.thread, self.classify, rows)
        output = StringCodec.encode_output("top5", answers)
        return InferenceResponse(model_name=self.name, outputs=[output])

    def classify(self, rows: list[str]) -> list[str]:
        """The JSON text of each image's answer."""
        [answer] = self.classifier.classify([[base64.b64decode(row) for row in rows]])
        return [json.dumps(top) for top in answer]


def main() -> None:
    options = Options.from_environment()
    server = {
        "host": "127.0.0.1",
        "http_port": options.port,
        "grpc_port": options.port + 1,
        "metrics_port": options.port + 2,
        "metrics_endpoint": None,
        "parallel_workers": options.workers,
        "debug": False,
    }
    model = {
        "name": "classifier",
        "implementation": "benchmarks.rivals.mlserver.Runtime",
        "max_batch_size": max(options.max_batch, options.images),
        "max_batch_time": options.wait_ms / 1e3,
    }
    (options.folder / "settings.json").write_text(json.dumps(server))
    (options.folder / "model-settings.json").write_text(json.dumps(model))
    program = str(Path(sys.executable).parent / "mlserver")
    os.execv(sys.executable, [sys.executable, program, "start", str(options.folder)])


if __name__ == "__main__":
    main()
