"""Towers that were not trained together, brought to one space without any training.

An image lies where its likely classes' names lie: the sentence embeddings of an image classifier's
class names, weighted by the softened probabilities (ConSE: Norouzi et al., arXiv 1312.5650). A
stand-in for a CLIP where there is none: it knows what the classifier's classes span.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.errors import CatalogError
from models.trunks.base import Trunk
from models.trunks.pooling import Projection
from models.trunks.text import TextTrunk

# Softer than the classifier's own probabilities, so that related classes count
# (benchmarks/zero_shot.py).
TEMPERATURE = 2.0
# From similarities to logits. Not calibrated.
SCALE = 15.0
BATCH = 32


class LikelyClasses(nn.Module):
    """(B, D) pooled features to (B, E): the classes' embeddings (K, E) by their probabilities."""

    weight: Tensor
    bias: Tensor
    classes: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, classes: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("classes", classes)

    def forward(self, x_BD: Tensor) -> Tensor:
        logits_BK = x_BD @ self.weight.T + self.bias
        embedded: Tensor = (logits_BK / TEMPERATURE).softmax(-1) @ self.classes
        return embedded


class Centred(Projection):
    """(B, E) embeddings of texts, brought to unit length, less their mean."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return super().forward(normalize(x_BD, dim=-1))


Joined = tuple[LikelyClasses, Centred]


@torch.inference_mode()
def join_by_classes(image: Trunk, text: TextTrunk, labels: Sequence[str]) -> Joined:
    """What takes the image and the text trunk's embeddings to one space.

    Raises:
        CatalogError: the image trunk has no linear classifier over its pooled features, or other
            classes than there are labels.
    """
    classifier = image.linear_classifier()
    if classifier is None or len(classifier[0]) != len(labels):
        raise CatalogError(
            f"join = 'classes' needs a linear classifier of {len(labels)} classes; "
            f"{image.architecture} has none"
        )
    texts = embed_texts(text, labels)
    mean = texts.mean(0)
    weight, bias = (value.detach().float().cpu() for value in classifier)
    return (
        LikelyClasses(weight.clone(), bias.clone(), texts - mean),
        Centred(mean, torch.eye(len(mean))),
    )


@torch.inference_mode()
def embed_texts(text: TextTrunk, texts: Sequence[str]) -> Tensor:
    """(N, D) embeddings of unit length, float32 on the CPU."""
    found = []
    for start in range(0, len(texts), BATCH):
        ids = [text.tokenize(item) for item in texts[start : start + BATCH]]
        found.append(text.pool(text.forward(text.collate(ids))).float().cpu())
    return normalize(torch.cat(found), dim=-1)


def save_joined(joined: Joined, path: Path) -> None:
    """Keep both in one safetensors file."""
    tensors = {
        f"{tower}.{name}": value.contiguous()
        for tower, module in zip(("image", "text"), joined, strict=True)
        for name, value in module.state_dict().items()
    }
    save_file(tensors, path)


def load_joined(path: Path) -> Joined:
    """Both again."""
    tensors = load_file(path)
    image = (tensors[f"image.{name}"] for name in ("weight", "bias", "classes"))
    return LikelyClasses(*image), Centred(tensors["text.mean"], tensors["text.weight"])
