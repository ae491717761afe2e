"""Segmenter's checkpoints (arXiv 2105.05633, github.com/rstrudel/segmenter): a ViT or a distilled
DeiT, and a linear or a mask transformer decoder.

The run's settings are beside the file, in `variant.yml`. Inputs are padded with zeros at the bottom
and on the right to whole patches, and the padding is cut off the logits.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import Known, whole
from models.checkpoints.families.segmentors import MAX_ASPECT
from models.checkpoints.families.vit import split_prefix, vit_checkpoint
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.segmentation.decoders import HEAD, class_count

NAME = "segmenter"
VARIANT = "variant.yml"
MAX_VARIANT_BYTES = 100_000
UNUSED = ("head.", "head_dist.")
HALF = (0.5, 0.5, 0.5)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    heads = {"decoder.head.weight", "decoder.cls_emb"} & keys
    if heads and {"encoder.pos_embed", "encoder.cls_token"} <= keys:
        return f"a ViT under encoder, and {min(heads)}"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`, by the names of `variant.yml`: `n_heads` (channels / 64), `decoder` with
    `n_heads` (channels / 64, as upstream builds it), `normalization` (`deit` or `vit`),
    `window_size` and `window_stride` in pixels (the size of the positions).

    Raises:
        CheckpointError: the file is not complete, or does not say how images are normalised.
    """
    variant = _variant(container)
    known = Known(arguments, variant)
    encoder, rest = split_prefix(container.tensors, "encoder.", drop=UNUSED)
    decoder, _ = split_prefix(container.tensors, "decoder.")
    distilled = "dist_token" in encoder
    dim = encoder["cls_token"].shape[-1]
    normalization = known.find("normalization") or ("deit" if distilled else None)
    if normalization not in ("deit", "vit"):
        known.require("normalization", "'deit' (ImageNet's statistics), 'vit' (-1 to 1)")
        raise CheckpointError(f"normalization is {normalization!r}; it can be 'deit' or 'vit'")
    head = _decoder(decoder)
    n_heads = whole("n_heads", known.get("n_heads", max(1, dim // 64), "num_heads"))
    side = int(encoder["patch_embed.proj.weight"].shape[-1])
    preprocess = Preprocess(crop_mode="squash", crop_pct=1.0, interpolation="bilinear")
    if normalization == "vit":
        preprocess = replace(preprocess, mean=HALF, std=HALF)
    checkpoint = vit_checkpoint(
        NAME,
        encoder,
        {"num_heads": n_heads},
        positions="bilinear-by-count",
        padding="corner",
        norm_eps=1e-5,
        distilled=distilled,
        num_classes=0,
        preprocess=preprocess,
        dropped=tuple(key for key in rest if not key.startswith("decoder.")),
    )
    depth, size = checkpoint.arguments["depth"], checkpoint.arguments["img_size"]
    settings = {
        "layers": [depth - 1],
        "inputs": [dim],
        "normed": True,
        "labels": _labels(known, class_count(head)),
        "windows": _windows(known, size, side),
        "run_whole": True,
    }
    if "cls_emb" in decoder:
        table = known.find("decoder")
        heads = table.get("n_heads") if isinstance(table, Mapping) else None
        if heads is None:
            known.assumed["decoder.n_heads"] = heads = max(1, dim // 64)
        settings |= {"num_heads": int(heads), "norm_eps": 1e-5}
    return replace(
        checkpoint,
        heads={"semantic": HeadState(head, settings)},
        assumed=known.assumed,
    )


def _labels(known: Known, classes: int) -> Any:
    """The label set of the data with that many classes, or numbers; assumed."""
    named = {150: "ade20k-150", 19: "cityscapes-19"}.get(classes)
    known.assumed["labels"] = named or "numbers"
    return named or [str(number) for number in range(classes)]


def _windows(known: Known, size: int, patch: int) -> dict[str, Any]:
    """Windows as the evaluation script cuts them.

    Raises:
        CheckpointError: patches do not tile them.
    """
    window = whole("window_size", known.get("window_size", size))
    stride = whole("window_stride", known.get("window_stride", window))
    shorter = max(window, whole("im_size", known.get("im_size", window)))
    if window < 1 or window % patch:
        raise CheckpointError(f"window_size is {window}; patches of {patch} pixels must tile it")
    return {
        "scale": [MAX_ASPECT * shorter, shorter],
        "crop": [window, window],
        "stride": [stride, stride],
        "pads": False,
    }


def _variant(container: Container) -> dict[str, Any]:
    """`net_kwargs` and `inference_kwargs` of `variant.yml` in the file's folder, in one; empty if
    there is none.

    Raises:
        CheckpointError: it is not YAML of that form.
    """
    path = container.path.with_name(VARIANT)
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_VARIANT_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_VARIANT_BYTES} bytes")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as YAML: {error}") from error
    tables = content if isinstance(content, dict) else {}
    parts = (tables.get(name) for name in ("net_kwargs", "inference_kwargs"))
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def _decoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors as those of a `decode_head`; a linear one is a 1x1 convolution."""
    named = {}
    for key, value in tensors.items():
        name = key.replace("head.", "conv_seg.") if key.startswith("head.") else key
        named[f"{HEAD}{name}"] = value[..., None, None] if key == "head.weight" else value
    return named
