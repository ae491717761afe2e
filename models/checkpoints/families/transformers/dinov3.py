"""transformers' DINOv3 with a ViT."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, number, whole
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    require,
    split,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

NAMES: Names = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
DEFAULTS = {
    "num_hidden_layers": 12,
    "num_register_tokens": 0,
    "query_bias": True,
    "value_bias": True,
}
DROPPED = ("embeddings.mask_token",)


def _dinov3(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    kept, dropped = split(container.tensors, "", DROPPED)
    gated = flag("use_gated_mlp", config.get("use_gated_mlp", False))
    up = (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
    state = renamed(kept, (*NAMES, up), ".qkv.")
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    if any(pixels % patch for pixels in preprocess.input_size):
        raise CheckpointError(f"images of {preprocess.input_size} are not whole patches of {patch}")
    registers = state["reg_token"].shape[1]
    if not registers:
        del state["reg_token"]
    heads = whole("num_attention_heads", config.get("num_attention_heads", 6))
    inner = len(state["blocks.0.mlp.fc1_x.weight" if gated else "blocks.0.mlp.fc1.weight"])
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    biased = "blocks.0.attn.q_bias" in state
    require(
        {**DEFAULTS, **config},
        num_channels=3,
        patch_size=patch,
        hidden_act="silu" if gated else "gelu",
        num_hidden_layers=depth,
        num_register_tokens=registers,
        query_bias=biased,
        value_bias=biased,
        key_bias=False,
        proj_bias=True,
        mlp_bias=True,
    )
    return Checkpoint(
        format=NAME,
        architecture="eva",
        library=OWN,
        arguments={
            "img_size": preprocess.input_size[0],
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio(inner, dim),
            "swiglu_mlp": gated,
            "swiglu_align_to": 1 if gated else 0,
            "qkv_bias": biased,
            "num_reg_tokens": registers,
            "init_values": 1.0,
            "norm_eps": number("layer_norm_eps", config.get("layer_norm_eps", 1e-5)),
            "rope_temperature": number("rope_theta", config.get("rope_theta", 100.0)),
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "use_rot_pos_emb": True,
            "use_abs_pos_emb": False,
            "use_fc_norm": False,
            "dynamic_img_size": True,
            "global_pool": "token",
            "num_classes": 0,
        },
        state_dict=state,
        dropped=dropped,
    )


CONVERTERS: dict[str, Converter] = {"dinov3_vit": _dinov3}
