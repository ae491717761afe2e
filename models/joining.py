"""Towers that were not trained together, brought to one space by a linear map in closed form.

An image classifier's rows and the sentence embeddings of its class names are pairs that need no
training data: ridge regression takes rows, centred and normalised, to embeddings, centred. An image
is then where its features, normalised, are taken. A stand-in for a CLIP where there is none: it
knows what the classifier's classes span.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from models.errors import CatalogError
from models.heads.embed import Projection
from models.text import TextTrunk
from models.trunk import Trunk

RIDGE = 10.0
# Similarities of this space reach 0.4; a softmax over them needs as much. Not calibrated.
SCALE = 25.0
BATCH = 32


class NormalisedProjection(Projection):
    """A projection of vectors brought to unit length."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return super().forward(normalize(x_BD, dim=-1))


@torch.inference_mode()
def join_by_labels(
    image: Trunk, text: TextTrunk, labels: Sequence[str]
) -> tuple[Projection, Projection]:
    """The projections of the image and of the text trunk's embeddings.

    Raises:
        CatalogError: the image trunk has no linear classifier over its pooled features, or other
            classes than there are labels.
    """
    classifier = getattr(image.network, "get_classifier", lambda: None)()
    rows = getattr(classifier, "weight", None)
    if rows is None or len(rows) != len(labels):
        raise CatalogError(
            f"join needs a classifier of {image.architecture} with a label for each class"
        )
    texts = embed_texts(text, labels)
    mean = texts.mean(0)
    rows_KD = rows.detach().float().cpu()
    rows_KD = normalize(rows_KD - rows_KD.mean(0), dim=-1)
    gram = rows_KD.T @ rows_KD + RIDGE * torch.eye(rows_KD.shape[1])
    weight = torch.linalg.solve(gram, rows_KD.T @ (texts - mean))
    zero = torch.zeros(rows_KD.shape[1])
    return NormalisedProjection(zero, weight), NormalisedProjection(mean, torch.eye(len(mean)))


@torch.inference_mode()
def embed_texts(text: TextTrunk, texts: Sequence[str]) -> Tensor:
    """(N, D) embeddings of unit length, float32 on the CPU."""
    found = []
    for start in range(0, len(texts), BATCH):
        ids = [text.tokenize(item) for item in texts[start : start + BATCH]]
        found.append(text.pool(text.forward(text.collate(ids))).float().cpu())
    return normalize(torch.cat(found), dim=-1)


def save_joined(projections: tuple[Projection, Projection], path: Path) -> None:
    """Keep both maps in one safetensors file."""
    tensors = {
        f"{tower}.{name}": value.contiguous()
        for tower, projection in zip(("image", "text"), projections, strict=True)
        for name, value in projection.state_dict().items()
    }
    save_file(tensors, path)


def load_joined(path: Path) -> tuple[Projection, Projection]:
    """Both maps again."""
    tensors = load_file(path)
    image, text = (
        NormalisedProjection(tensors[f"{tower}.mean"], tensors[f"{tower}.weight"])
        for tower in ("image", "text")
    )
    return image, text
