"""transformers' plain ViTs: ViT, DeiT, DINOv2 with and without registers, and the encoders of
ViT-MSN and ViT-MAE, the latter without its mask."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, number, whole
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    require,
    require_positions,
    side,
    split,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.checkpoints.families.vit import vit_checkpoint
from models.inputs.transforms import Preprocess

NAMES: Names = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
# The name of the backbone, where it is not the network's.
PREFIXES = {"vit_msn": "vit.", "vit_mae": "vit."}
# Not served: the pooler, which published checkpoints leave untrained, and what pre-training needs.
DROPPED = ("pooler.", "embeddings.mask_token", "decoder.")
DEFAULTS = {"num_hidden_layers": 12, "qkv_bias": True}


def _vit(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    kind = str(config["model_type"])
    dropped = DROPPED if kind == "vit_mae" else DROPPED[:2]
    kept, others = split(container.tensors, PREFIXES.get(kind, f"{kind}."), dropped)
    tensors = renamed(kept, NAMES, ".qkv.")
    built: dict[str, Any] = {}
    heads: dict[str, HeadState] = {}
    architecture = "vit"
    if "dist_token" in tensors:
        architecture = "distilled-vit" if "head_dist.weight" in tensors else "vit"
        built = {} if architecture == "distilled-vit" else {"distilled": True}
    if kind.startswith("dinov2"):
        gated = flag("use_swiglu_ffn", config.get("use_swiglu_ffn", False))
        built = {"whole_patches": False, "gated": gated}
        head = {k: tensors.pop(k) for k in ("head.weight", "head.bias") if k in tensors}
        if head:
            named = {f"classifier.0.{k.removeprefix('head.')}": v for k, v in head.items()}
            heads["linear"] = HeadState(named, {"layers": [-1], "mean": "appended"})
    checkpoint = vit_checkpoint(
        NAME,
        tensors,
        {"num_heads": whole("num_attention_heads", config.get("num_attention_heads"))},
        positions="antialias" if "reg_token" in tensors else "bicubic",
        heads=heads,
        dropped=others,
        architecture=architecture,
        norm_eps=number("layer_norm_eps", config.get("layer_norm_eps")),
        **built,
    )
    network = checkpoint.arguments
    patch = network["patch_size"]
    require_positions(side(config, "image_size", 224), network)
    require(
        {**DEFAULTS, **config, "patch_size": side(config, "patch_size", patch)},
        hidden_act="gelu",
        num_channels=3,
        patch_size=patch,
        num_hidden_layers=network["depth"],
        qkv_bias=network["qkv_bias"],
        num_register_tokens=network["reg_tokens"],
    )
    return checkpoint


CONVERTERS: dict[str, Converter] = dict.fromkeys(
    ("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vit_msn"), _vit
)
