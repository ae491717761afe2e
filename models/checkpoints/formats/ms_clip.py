"""MS-CLIP-S (arXiv 2207.12661, github.com/Hxyou/MSCLIP): a flat state dict of both towers.

The towers share most of their blocks' weights, which are stored under both names.

`arguments["CUSTOM"]` is upstream's configuration. Without it, strides are computed from the
adapters: an adapter's kernel is its stride, it spans a patch together with the stages before it,
and the first stage halves the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed, head_count
from models.checkpoints.families.known import wholes
from models.checkpoints.families.towers import LIBRARY, text_arguments, tower_states
from models.checkpoints.families.vit import split_prefix
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

NAME = "ms-clip"
BRANCH = "transformer.parallel_branch_v."
ADAPTER = "transformer.parallel_lateral_adapter."


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if f"visual.{ADAPTER}0.ln_adapt.weight" in container.tensors:
        return "a CLIP with adapters from a parallel branch to its image tower"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `vision_heads`, `text_heads` (as published), `CUSTOM`.

    Raises:
        CheckpointError: the configuration is not of MS-CLIP-S as published.
    """
    visual, others = split_prefix(container.tensors, "visual.")
    text = {key: container.tensors[key] for key in others if key != "logit_scale"}
    guessed: dict[str, Any] = {}
    image = _image_arguments(visual, arguments, guessed)
    size = image["img_size"]
    language = text_arguments(text, arguments, "text_heads")
    return Checkpoint(
        format=NAME,
        library=LIBRARY,
        architecture=f"MS-CLIP-S of width {image['width']}, patch {image['patch_size']}",
        arguments={
            "image": {"architecture": "ms-clip-image", **image},
            "text": {**language, "norm_eps": 1e-12},
            "tokenizer": {"name": "openai"},
        },
        assumed=assumed(arguments, vision_heads=image["heads"], text_heads=language["heads"])
        | guessed,
        state_dict=tower_states(visual, text, container.tensors["logit_scale"]),
        preprocess=replace(Preprocess(), input_size=(size, size), crop_pct=1.0),
    )


def _image_arguments(
    visual: Mapping[str, Tensor], arguments: Mapping[str, Any], guessed: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `MsClipImage`, from the shapes and the configuration.

    Args:
        guessed: extended by what the configuration does not say, as `CUSTOM.NAME`.

    Raises:
        CheckpointError: a setting is not a list with a value for each part, or does not fit.
    """
    custom: Mapping[str, Any] = arguments.get("CUSTOM", {})
    adapters = len({key.split(".")[2] for key in visual if key.startswith(ADAPTER)})
    layers = len({k.split(".")[2] for k in visual if k.startswith("transformer.resblocks.")})
    stem = {k.split(".")[4] for k in visual if ".resblocks.0.resnet_stage." in k}

    def setting(name: str, default: Sequence[int], count: int) -> tuple[int, ...]:
        if name not in custom:
            guessed[f"CUSTOM.{name}"] = list(default)[:count]
        values = wholes(name, custom.get(name, list(default)))
        if len(values) < count:
            raise CheckpointError(f"{name} is {values}; the file has {count} parts to set")
        return tuple(values[:count])

    reduces = [visual[f"{ADAPTER}{i}.top2bottom_dw_conv.conv.weight"] for i in range(adapters)]
    kernels = [int(weight.shape[-1]) for weight in reduces]
    patch = 2 * kernels[0]
    halvings = (patch // 2).bit_length() - 1
    width, hidden = visual["transformer.resblocks.1.mlp.c_proj.weight"].shape
    cells = len(visual["positional_embedding"]) - 1
    stem_strides = setting(
        "EARLY_CONV_RES_STRIDES",
        [2] * halvings + [1] * (len(stem) - halvings),
        len(stem),
    )
    strides = setting("PARALLEL_STRIDES", [2, *(a // b for a, b in pairwise(kernels))], adapters)
    kernel_strides = setting("PRALLEL_T2B_STRIDES", kernels, adapters)
    for name in ("PRALLEL_T2B_USECLS", "PARALLEL_RESNET", "EARLY_CONV_RES"):
        if not custom.get(name, True):
            raise CheckpointError(f"{name} is off; it must be on, as in MS-CLIP-S as published")
    if any(wholes("PRALLEL_T2B_PADDINGS", custom.get("PRALLEL_T2B_PADDINGS", []), 0)[:adapters]):
        raise CheckpointError("PRALLEL_T2B_PADDINGS must be 0, as in MS-CLIP-S as published")
    _check_spans(strides, kernel_strides, patch)
    step = max(1, layers // (adapters + 1))
    lateral = setting("PARALLEL_LATERAL_LAYER", range(step, layers, step), adapters)
    if any(later <= one for one, later in pairwise((0, *lateral, layers))):
        raise CheckpointError(
            f"PARALLEL_LATERAL_LAYER is {list(lateral)}; they must be blocks from 1 to "
            f"{layers - 1}, in their order"
        )
    return {
        "img_size": round(cells**0.5) * patch,
        "patch_size": patch,
        "width": width,
        "heads": head_count(width, arguments, name="vision_heads"),
        "hidden": hidden,
        "layers": layers,
        "projected": visual["proj"].shape[1],
        "stem_strides": stem_strides,
        "channels": [int(weight.shape[0]) for weight in reduces],
        "bottlenecks": [
            int(visual[f"{BRANCH}{i}.resnet_stage.conv_0.conv1.weight"].shape[0])
            for i in range(1, adapters)
        ],
        "strides": strides,
        "kernels": kernels,
        "kernel_strides": kernel_strides,
        "first_kernels": [
            int(visual[f"{part}.weight"].shape[-1])
            for part in ("transformer.resblocks.0.conv1", f"{BRANCH}0.conv")
        ],
        "lateral": lateral,
    }


def _check_spans(strides: Sequence[int], kernel_strides: Sequence[int], patch: int) -> None:
    """Refuse adapters whose output is not the grid of patches."""
    span = 1
    for i, stride in enumerate(strides):
        span *= stride
        if span * kernel_strides[i] != patch:
            raise CheckpointError(
                f"the branch's stage {i} and its adapter span {span * kernel_strides[i]} pixels, "
                f"not a patch of {patch}"
            )
