"""A model: what a request names. A head on a trunk, with the trunk's own preprocessing."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.answers import answer_entry
from models.errors import InputError, TaskError
from models.heads import Head
from models.heads.embed import Embed
from models.images import DEFAULT_LIMITS, ImageLimits, decode_image, to_upright_rgb
from models.preprocess import collate, create_transform
from models.trunk import Trunk, parameter_bytes, state_digest

ImageLike = Image.Image | bytes | str | Path


class Model:
    """Serves its head's task; and `embed`, since every trunk can be pooled.

    `digest` is over weights, transform and task: while it stays, so do embeddings (of one dtype).
    """

    def __init__(self, name: str, trunk: Trunk, head: Head) -> None:
        self.name = name
        self.trunk = trunk
        self.task = head.task
        self.heads: dict[str, Head] = {"embed": Embed(trunk), head.task: head}
        self.transform = create_transform(trunk.preprocess)
        weights = state_digest(head.network.state_dict()) if head.network else ""
        parts = f"{trunk.digest} {trunk.preprocess.digest} {head.task} {weights}"
        self.digest = "sha256:" + hashlib.sha256(parts.encode()).hexdigest()
        self.head_bytes = parameter_bytes(head.network) if head.network else 0

    def head(self, task: str | None, options: Mapping[str, Any]) -> Head:
        """The head for `task` (the model's own if None), having checked `options` with it.

        Raises:
            TaskError: this model does not do that.
            InputError: an option out of what this model can do.
        """
        head = self.heads.get(task or self.task)
        if head is None:
            raise TaskError(
                f"model {self.name!r} does not do {task!r}; it does {', '.join(self.tasks)}",
                field="model",
            )
        head.check(options)
        return head

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model does, its own task first."""
        return (self.task, *(task for task in self.heads if task != self.task))

    def predict(
        self,
        images: Sequence[ImageLike],
        *,
        task: str | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Answer as the server would: one entry an image, in order.

        Raises:
            InputError: an image that does not decode, or an option out of range.
        """
        if not images:
            return []
        head = self.head(task, options)
        decoded = [load_image(image, limits) for image in images]
        pixels_BCHW = collate([self.transform(image) for image in decoded])
        rows = self.forward(pixels_BCHW, head, options)
        finish = {k: v for k, v in options.items() if k not in head.forward_options}
        return [
            answer_entry(head.task, head.finish(row, image.size, **finish))
            for row, image in zip(rows, decoded, strict=True)
        ]

    @torch.inference_mode()
    def forward(
        self, pixels_BCHW: Tensor, head: Head, options: Mapping[str, Any]
    ) -> list[dict[str, np.ndarray]]:
        """Trunk and head for a batch of pixels; named float32 arrays for each row."""
        output = self.trunk.forward(pixels_BCHW)
        forward = {k: v for k, v in options.items() if k in head.forward_options}
        tensors = head.forward(output, **forward)
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
        return [
            {name: array[row] for name, array in arrays.items()} for row in range(len(pixels_BCHW))
        ]

    @torch.inference_mode()
    def run(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """All named outputs for preprocessed pixels (B, 3, H, W): the head's, `embedding` (the
        trunk's own pooling, not normalised) and `tokens` or `feature_map`; float32 on the CPU."""
        output = self.trunk.forward(pixel_values)
        kind = "tokens" if output.features.dim() == 3 else "feature_map"
        named = {kind: output.features, "embedding": self.trunk.pool(output)}
        for head in self.heads.values():
            named |= head.forward(output)
        return {name: tensor.float().cpu() for name, tensor in named.items()}


def load_image(image: ImageLike, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB image from a Pillow image, encoded bytes or a path."""
    if isinstance(image, bytes):
        return decode_image(image, limits)
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)
    try:
        return decode_image(Path(image).read_bytes(), limits)
    except OSError as error:
        raise InputError(f"{image}: {error.strerror}") from error
