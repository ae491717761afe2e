"""Checkpoints of Hugging Face's transformers (github.com/huggingface/transformers): ViT, DeiT,
DINOv2, DINOv3, ViT-MSN, ViT-MAE, BEiT, data2vec, Swin, ConvNeXt, ResNet, MobileNetV2,
CLIP, SigLIP.

`model.safetensors` or `pytorch_model.bin`, whole or as an index of shards, with `config.json`,
which states the network, and `preprocessor_config.json`, which states the transform. Other
networks are refused by their name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.transformers import (
    beit,
    clip,
    convnext,
    dinov3,
    mobilenet,
    resnet,
    siglip,
    swin,
    vit,
)
from models.checkpoints.families.transformers.configuration import (
    FILE,
    NAME,
    Converter,
    read_beside,
    read_labels,
)
from models.checkpoints.families.transformers.processors import read_preprocess
from models.errors import CheckpointError

# With or without the name of the backbone. `transformer.` is the name of others' ViTs.
MARK = re.compile(
    r"^((?!transformer\.)\w+\.)?embeddings\.patch_embeddings\.(projection\.)?weight$"
    r"|^(vision_model\.)?embeddings\.patch_embedding\.weight$"
    r"|^(resnet\.)?embedder\.embedder\.convolution\.weight$"
    r"|^(mobilenet_v2\.)?conv_stem\.first_conv\.convolution\.weight$"
    r"|^(model\.)?stages\.0\.downsample_layers\.0\.weight$"
)
CLASSIFIERS = ("classifier", "cls_classifier", "classifier.1")
FAMILIES = (vit, beit, swin, dinov3, convnext, resnet, mobilenet, clip, siglip)
CONVERTERS: Mapping[str, Converter] = {
    kind: convert for family in FAMILIES for kind, convert in family.CONVERTERS.items()
}

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.graph is None and any(MARK.match(key) for key in container.tensors):
        return "transformers' names of a patch embedding"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """No `arguments`: the files beside the weights state everything.

    Raises:
        CheckpointError: a file beside the weights is missing, or states what is not supported.
    """
    config = read_beside(container.path, FILE)
    if not config:
        raise CheckpointError(
            f"{container.path}: these are transformers' names for the weights, whose {FILE} is "
            "missing beside the file"
        )
    kind = str(config.get("model_type"))
    if kind not in CONVERTERS:
        raise CheckpointError(
            f"{container.path}: transformers' {kind!r} is not supported. Supported are "
            f"{', '.join(CONVERTERS)}; of others, use the file of the authors, timm or open_clip"
        )
    preprocess = read_preprocess(container.path, kind)
    try:
        checkpoint = CONVERTERS[kind](container, config, preprocess)
        _check_task(container, config)
    except CheckpointError as error:
        raise CheckpointError(f"{container.path}: {error}") from error
    return replace(checkpoint, preprocess=preprocess, labels=read_labels(config))


def _check_task(container: Container, config: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: a classifier whose scores are not those of a softmax, or of another number
            of classes than the configuration names.
    """
    found = (container.tensors.get(f"{name}.weight") for name in CLASSIFIERS)
    classes = [len(weight) for weight in found if weight is not None]
    problem = config.get("problem_type")
    if classes and problem not in (None, "single_label_classification"):
        raise CheckpointError(f"problem_type is {problem}, which is not supported")
    if 1 in classes:
        raise CheckpointError("a classifier of one class is not supported")
    named = config.get("id2label")
    if isinstance(named, Mapping) and any(len(named) != count for count in classes):
        raise CheckpointError(
            f"id2label names {len(named)} classes; the classifier has {classes[0]}"
        )
