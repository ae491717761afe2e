"""LitServe: uploads as forms, batches made by the workers' loops. https://lightning.ai/litserve"""

from typing import cast

import litserve
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.rivals.classifier import Answer, Classifier
from benchmarks.rivals.forms import read_parts
from benchmarks.rivals.options import Options

Images = list[bytes]


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier(Options.from_environment())

    # LitServe makes the route of the annotations of `request` and of `encode_response`: with these
    # it passes a parsed form, and does not validate what is returned.
    def decode_request(self, request: Request) -> Images:
        return read_parts(cast("FormData", request))

    def batch(self, inputs: list[Images]) -> list[Images]:
        return inputs

    def predict(self, x: list[Images] | Images) -> list[Answer] | Answer:
        if self.max_batch_size == 1:  # LitServe does not batch then
            return self.classifier.classify([cast("Images", x)])[0]
        return self.classifier.classify(cast("list[Images]", x))

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output

    def encode_response(self, output: Answer) -> Response:
        return cast("Response", {"results": output})


if __name__ == "__main__":
    options = Options.from_environment()
    api = Api(max_batch_size=options.max_requests, batch_timeout=options.wait_ms / 1e3)
    server = litserve.LitServer(
        api, accelerator=options.device, devices=1, workers_per_device=options.workers, timeout=120,
        fast_queue=True,
    )  # fmt: skip
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False)
