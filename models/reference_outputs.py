"""A model's named outputs for tensors: what `Model.run` gives, by the authors' names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.heads.dense import DenseClip
from models.heads.semantic import Semantic
from models.heads.zero_shot import ZeroShot
from models.trunks.features import Need, together
from models.trunks.generator import Generator
from models.trunks.open_clip import OpenClipTrunk

if TYPE_CHECKING:
    from models.model import Model


def run_images(model: "Model", inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the trunk gives for `pixel_values`, what its heads make of it, and what the
    checkpoint's format adds; of a segmenter for a larger input than it takes, masks alone."""
    pixels = inputs["pixel_values"]
    segmenter = model.heads[model.task]
    if isinstance(segmenter, Semantic) and segmenter.wants_windows(pixels):
        return segmenter.run(pixels)
    rows = range(len(pixels))
    heads = {task: model.heads[task] for task in ("embed", model.task)}
    needs = [model.need, *(each.needs(rows) for each in heads.values())]
    output = model.trunk.forward(pixels, together(needs))
    kind = "tokens" if output.features.dim() == 3 else "feature_map"
    named = {kind: output.features, "embedding": model.trunk.pool(output)}
    for each in heads.values():
        named |= each.forward(output)
    if isinstance(segmenter, Semantic):
        named |= segmenter.run(pixels)
    if model.outputs is not None:
        named |= model.outputs(model, output, inputs)
    return named


def run_towers(
    model: "Model", head: ZeroShot, pixel_values: Tensor | None, token_ids: Tensor | None
) -> dict[str, Tensor]:
    """The outputs of two towers."""
    named = {"logit_scale": torch.tensor([head.scale])}
    if pixel_values is not None:
        output = model.trunk.forward(pixel_values, model.need)
        named["image_embedding"] = head.forward(output)["embedding"]
        named["image_embedding_normalized"] = normalize(named["image_embedding"], dim=-1)
        if model.outputs is not None:
            named |= model.outputs(model, output, {"pixel_values": pixel_values})
        if isinstance(model.trunk, OpenClipTrunk):
            named |= model.trunk.before_projection(pixel_values)
    if token_ids is not None:
        text = model.trunk_for("text")
        named["text_embedding"] = model.text_embed.forward(text.forward(token_ids))["embedding"]
        named["text_embedding_normalized"] = normalize(named["text_embedding"], dim=-1)
    if pixel_values is not None and token_ids is not None:
        similarity = named["image_embedding_normalized"] @ named["text_embedding_normalized"].T
        named["logits_per_image"] = head.scale * similarity + (head.bias or 0.0)
    return named


def run_dense(
    model: "Model", head: DenseClip, pixel_values: Tensor | None, token_ids: Tensor | None
) -> dict[str, Tensor]:
    """Those of a CLIP that labels patches; its embeddings have unit length."""
    named: dict[str, Tensor] = {}
    if token_ids is not None:
        text = model.trunk_for("text")
        embedded = model.text_embed.forward(text.forward(token_ids))["embedding"]
        named["text_embedding"] = normalize(embedded, dim=-1)
    if pixel_values is not None:
        pooled = model.trunk.pool(model.trunk.forward(pixel_values, Need(dense=True)))
        named["image_embedding"] = normalize(pooled, dim=-1)
        named |= head.run(pixel_values, named.get("text_embedding"))
    return named


def run_generator(trunk: Generator, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`style` (B, D) and `images` of `latent` (B, D) without noise; with `noise_0` and so on, one
    tensor a layer, `images_noised` too."""
    latent = inputs["latent"].to(trunk.placement.device, trunk.placement.dtype)
    named = {"style": trunk.network.style(latent), "images": trunk.network(latent)}
    noise = [inputs[name] for i in range(len(trunk.preprocess.noise))
             if (name := f"noise_{i}") in inputs]  # fmt: skip
    noise = noise or list(inputs.get("noise", ()))
    if noise:
        named["images_noised"] = trunk.network(latent, [each.to(latent) for each in noise])
    return named
