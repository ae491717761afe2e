"""Labels given as texts, scored by the similarity of their embeddings to the image's.

Softmax of scaled cosine similarities (CLIP, arXiv 2103.00020), or a sigmoid each (SigLIP, arXiv
2303.15343), whose checkpoints have a bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError
from models.heads.base import Head
from models.heads.embed import Embed
from models.heads.prompted import Prompted, Similarity
from models.reference_outputs import Parts
from models.trunks.base import Trunk
from models.trunks.conse import SCALE
from models.trunks.open_clip import OpenClipTrunk
from models.trunks.output import TrunkOutput
from models.trunks.text import TextTrunk


class ZeroShot(Prompted):
    kind = "zero-shot"
    task = "zero-shot"

    def __init__(
        self,
        embed: Embed,
        similarity: Similarity,
        templates: Sequence[str],
        labels: Sequence[str] = (),
        text_embed: Embed | None = None,
    ) -> None:
        self.embed = embed
        self.network = embed.network
        self.similarity = similarity
        self.templates = tuple(templates)
        self.labels = tuple(labels)
        self.text_embed = text_embed

    @classmethod
    def create_prompted(
        cls,
        image: Trunk,
        text: TextTrunk,
        similarity: Similarity | None,
        *,
        state: HeadState | None = None,
        join: Any = None,
        templates: Sequence[str],
        labels: Sequence[str] = (),
    ) -> Self:
        if join is not None:
            image_projection, text_projection = join
            embed = Embed(image, projection=image_projection)
            text_embed = Embed(text, projection=text_projection)
            return cls(embed, Similarity(SCALE), templates, labels, text_embed)
        if similarity is None:
            raise CatalogError("the towers were not trained together; set join = 'classes'")
        return cls(Embed(image), similarity, templates, labels)

    def companions(self) -> Mapping[str, Head]:
        return {"embed": self.embed}

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`embedding` (B, D)."""
        return self.embed.forward(output)

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        classes: np.ndarray,
        labels: Sequence[str],
        multi_label: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """All labels, best first: `index` (k,) int64, `label` (k,) str, `score` (k,) float32.

        Args:
            classes: (k, D) embeddings of the labels, of unit length.
            multi_label: a sigmoid each instead of a softmax over all; None: as trained.
        """
        image = self.embed.finish(row, size)["embedding"]
        bias = self.similarity.bias
        logits = self.similarity.scale * (classes @ image) + (bias or 0.0)
        sigmoid = bias is not None if multi_label is None else multi_label
        scores = _sigmoid(logits) if sigmoid else _softmax(logits)
        index = np.argsort(-logits, kind="stable")
        return {
            "index": index,
            "label": np.array(labels, dtype=object)[
                index
            ],  # as texts each is as long as the longest
            "score": scores[index].astype(np.float32),
        }

    def reference_outputs(self, parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`logit_scale`, and `logit_bias` if there is one; of `pixel_values` and `token_ids` the
        embeddings, as they are and of unit length; of both `logits_per_image` (B, N)."""
        scale, bias = self.similarity.scale, self.similarity.bias or 0.0
        named = {"logit_scale": torch.tensor([scale])}
        if self.similarity.bias is not None:
            named["logit_bias"] = torch.tensor([bias])
        pixels, token_ids = inputs.get("pixel_values"), inputs.get("token_ids")
        if pixels is not None:
            output = parts.trunk.forward(pixels, parts.format_batch_request(len(pixels)))
            named["image_embedding"] = self.forward(output)["embedding"]
            named["image_embedding_normalized"] = normalize(named["image_embedding"], dim=-1)
            named |= parts.outputs(output, {"pixel_values": pixels})
            if isinstance(parts.trunk, OpenClipTrunk):
                named |= parts.trunk.before_projection(pixels)
        if token_ids is not None:
            named["text_embedding"] = parts.embed_texts(token_ids)
            named["text_embedding_normalized"] = normalize(named["text_embedding"], dim=-1)
        if pixels is not None and token_ids is not None:
            similarity = named["image_embedding_normalized"] @ named["text_embedding_normalized"].T
            named["logits_per_image"] = scale * similarity + bias
        return named


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max())
    return np.asarray(exponents / exponents.sum())


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -60, 60))))
