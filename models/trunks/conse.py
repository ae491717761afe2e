"""ConSE: a joint embedding space of an image classifier and a text encoder, without training.

An image's embedding is the mean of its classes' name embeddings, weighted by the classifier's
probabilities (Norouzi et al., arXiv 1312.5650). The demo uses this in place of a CLIP. It can only
represent what the classifier's classes cover.
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

# Of the classifier's softmax. Above 1, so that related classes contribute more
# (benchmarks/zero_shot.py).
TEMPERATURE = 2.0
# Factor from similarities to logits. Not calibrated.
SCALE = 15.0
BATCH = 32


class LikelyClasses(nn.Module):
    """Maps pooled features (B, D) to (B, E): the class embeddings' mean, weighted by probability.

    Args:
        weight, bias: the classifier's, (K, D) and (K,).
        classes: class embeddings, (K, E).
    """

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
    """Normalizes text embeddings (B, E) to unit length, then subtracts a mean."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return super().forward(normalize(x_BD, dim=-1))


Joined = tuple[LikelyClasses, Centred]


@torch.inference_mode()
def join_by_classes(image: Trunk, text: TextTrunk, labels: Sequence[str]) -> Joined:
    """The projections of the image trunk's and the text trunk's outputs to the joint space.

    Args:
        labels: the names of the image classifier's classes.

    Raises:
        CatalogError: the image trunk has no linear classifier on its pooled features, or the
            classifier has another number of classes.
    """
    classifier = image.linear_classifier()
    if classifier is None or len(classifier[0]) != len(labels):
        raise CatalogError(
            f"join = 'classes' needs a linear classifier of {len(labels)} classes, which "
            f"{image.architecture} does not have"
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
    """Text embeddings (N, D) of unit length, float32 on the CPU."""
    embeddings = []
    for start in range(0, len(texts), BATCH):
        ids = [text.tokenize(item) for item in texts[start : start + BATCH]]
        embeddings.append(text.pool(text.forward(text.collate(ids))).float().cpu())
    return normalize(torch.cat(embeddings), dim=-1)


def save_joined(joined: Joined, path: Path) -> None:
    """Write both projections to a safetensors file."""
    tensors = {
        f"{tower}.{name}": value.contiguous()
        for tower, module in zip(("image", "text"), joined, strict=True)
        for name, value in module.state_dict().items()
    }
    save_file(tensors, path)


def load_joined(path: Path) -> Joined:
    """Read both projections from a file that `save_joined` wrote."""
    tensors = load_file(path)
    image = (tensors[f"image.{name}"] for name in ("weight", "bias", "classes"))
    return LikelyClasses(*image), Centred(tensors["text.mean"], tensors["text.weight"])
