"""The model that every rival serves: a timm network, timm's eval transform, and the top 5."""

import io
from collections.abc import Sequence
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor

from benchmarks.rivals.options import Options

# The answer to one request: for each image its five best classes.
Answer = list[list[dict[str, Any]]]


class Classifier:
    """Encoded images to their five best classes."""

    def __init__(self, options: Options) -> None:
        self.max_batch = options.max_batch
        self.device, self.dtype = options.device, getattr(torch, options.precision)
        self.network = timm.create_model(options.architecture).eval()
        self.network.load_state_dict(load_file(options.weights))
        self.network.to(self.device, self.dtype)
        self.transform = create_transform(**resolve_model_data_config(self.network))
        names = ImageNetInfo("imagenet-1k")
        self.labels = [names.index_to_description(index) for index in range(1000)]

    def classify(self, requests: Sequence[Sequence[bytes]]) -> list[Answer]:
        """The answers to requests of one or more encoded images, which share batches."""
        pixels = [self.prepare(image) for request in requests for image in request]
        rows: Answer = []
        for start in range(0, len(pixels), self.max_batch):
            rows += self.forward(pixels[start : start + self.max_batch])
        answers = []
        for request in requests:
            answers.append(rows[: len(request)])
            rows = rows[len(request) :]
        return answers

    def prepare(self, image: bytes | Image.Image) -> Tensor:
        """An image as the network takes it, (3, height, width) float32."""
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        pixels: Tensor = self.transform(opened.convert("RGB"))
        return pixels

    @torch.inference_mode()
    def forward(self, pixels: Sequence[Tensor]) -> Answer:
        """The five best classes of each prepared image, in one pass."""
        batch = torch.stack(list(pixels)).to(self.device, self.dtype)
        top = self.network(batch).float().softmax(-1).topk(5)
        return [
            [{"index": index, "label": self.labels[index], "score": round(score, 6)}
             for index, score in zip(*row, strict=True)]
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]  # fmt: skip
