"""transformers' Swin and Swin V2."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, whole, wholes
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.swin import swin_checkpoint
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    require,
    require_size,
    side,
    split,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

# To the authors' names.
NAMES: Names = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
# Swin V2's, of whose biases timm keeps two, and counts a stage's downsampling to the next.
SECOND: Names = (
    *NAMES,
    (r"\.attn\.(q|v)\w+\.bias$", r".attn.\1_bias"),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"^head\.", "head.fc."),
)
# What pre-training by SimMIM needs.
DROPPED = ("embeddings.mask_token", "decoder.")
# Constants, which older versions store.
BUFFERS = ("relative_position_index", "relative_coords_table")
DEFAULTS = {"depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
EPS = 1e-5  # of the norms that the configuration does not tell


def _swin(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    kept, dropped = split(container.tensors, "swin.", DROPPED)
    size = _square(preprocess)
    checkpoint = swin_checkpoint(
        NAME,
        renamed(kept, NAMES, ".qkv."),
        {"img_size": size},
        dropped=dropped,
        norm_eps=EPS,
        qkv_bias=flag("qkv_bias", config.get("qkv_bias", True)),
    )
    network = checkpoint.arguments
    _require_as_published(config, network)
    last = -(-size // network["patch_size"]) / 2 ** (len(network["depths"]) - 1)
    if last < network["window_size"]:
        raise CheckpointError(f"windows of {network['window_size']} cells in a map of {last:g}")
    return checkpoint


def _swin_v2(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    kept, dropped = split(container.tensors, "swinv2.", DROPPED)
    constants = tuple(key for key in kept if key.endswith(BUFFERS))
    state = {}
    parts = {key: value for key, value in kept.items() if key not in constants}
    for key, value in renamed(parts, SECOND, ".qkv.").items():
        if ".downsample." in key:
            stage, _, rest = key.removeprefix("layers.").partition(".")
            key = f"layers.{int(stage) + 1}.{rest}"
        state[key] = value
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    config = {**DEFAULTS, **config}
    size, window = side(config, "image_size", 224), whole("window_size", config.get("window_size"))
    require_size(preprocess, size)
    heads = wholes("num_heads", config.get("num_heads"))
    stages = range(len(heads))
    pretrained = wholes(
        "pretrained_window_sizes", config.get("pretrained_window_sizes", [0] * len(heads)), 0
    )
    if len(pretrained) < len(heads):  # of a longer list transformers uses the beginning
        raise CheckpointError(
            f"pretrained_window_sizes is {pretrained}; there are {len(heads)} stages"
        )
    head = state.get("head.fc.weight")
    network = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": dim,
        "depths": [
            len({k.split(".")[3] for k in state if k.startswith(f"layers.{stage}.blocks.")})
            for stage in stages
        ],
        "num_heads": heads,
        "window_size": window,
        "pretrained_window_sizes": pretrained[: len(heads)],
        "mlp_ratio": mlp_ratio(len(state["layers.0.blocks.0.mlp.fc1.weight"]), dim),
        "qkv_bias": flag("qkv_bias", config.get("qkv_bias", True)),
        "num_classes": 0 if head is None else len(head),
    }
    _require_as_published(config, network)
    for number in stages:
        pixels = patch * 2**number  # of a cell
        cells = size // pixels
        if size % pixels or cells % min(window, cells):
            raise CheckpointError(f"{size} pixels are not whole windows in stage {number}")
    return Checkpoint(
        format=NAME,
        architecture="swin-v2",
        library=OWN,
        arguments=network,
        state_dict=state,
        dropped=(*dropped, *constants),
    )


def _square(preprocess: Preprocess) -> int:
    rows, columns = preprocess.input_size
    if rows != columns:
        raise CheckpointError(f"images are {rows}x{columns} pixels; only squares are supported")
    return rows


def _require_as_published(config: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    require(
        {**DEFAULTS, **config},
        num_channels=3,
        hidden_act="gelu",
        layer_norm_eps=EPS,
        depths=network["depths"],
        num_heads=network["num_heads"],
        window_size=network["window_size"],
        use_absolute_embeddings=False,
    )


CONVERTERS: dict[str, Converter] = {"swin": _swin, "swinv2": _swin_v2}
