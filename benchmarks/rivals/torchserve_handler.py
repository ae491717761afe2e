"""TorchServe's handler, which it imports from the archive."""

from collections.abc import Mapping
from typing import Any

from benchmarks.rivals.classifier import Answer, Classifier
from benchmarks.rivals.options import Options


class Handler:
    def initialize(self, context: Any) -> None:
        self.classifier = Classifier(Options.from_environment())

    def handle(self, data: list[Mapping[str, bytes]], context: Any) -> list[dict[str, Answer]]:
        """Answer a batch: the parts of each request by name, or its whole body as `body`."""
        requests = [[bytes(row[name]) for name in sorted(row)] for row in data]
        return [{"results": answer} for answer in self.classifier.classify(requests)]
