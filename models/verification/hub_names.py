"""The names of weights in the files of transformers' hub.

The format that reads such files has a table of its own, so that no mistake is in both.
"""

import re
from collections.abc import Mapping

from torch import Tensor

Names = tuple[tuple[str, str], ...]

# From the names here to those of the hub's files. Weights of queries, keys and values are apart.
TOKENS: Names = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
)
BLOCKS: Names = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
SCALED: Names = ((r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),)
GATED: Names = ((r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out."))
TABLE = "relative_position_bias.relative_position_bias_table"
BEIT: Names = (
    (r"\.attn\.(q|v)_bias$", r".attn.\1_bias"),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.attn\.relative_position_bias_table", f".attention.attention.{TABLE}"),
    (r"^rel_pos_bias\.relative_position_bias_table", f"encoder.{TABLE}"),
    (r"^fc_norm\.", "pooler.layernorm."),
)
CONVNEXT: Names = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^head\.norm\.", "layernorm."),
    (r"^stages\.", "encoder.stages."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
)
CLIP: Names = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.(query|key|value)\.", r".self_attn.\1."),
    (r"\.self_attn\.(.)(?:uery|ey|alue)\.", r".self_attn.\1_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the weights of queries, keys and values apart."""
    parts = {}
    for key, value in state.items():
        if ".attn.qkv." not in key:
            parts[key] = value
            continue
        for name, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
            parts[key.replace(".qkv.", f".{name}.")] = rows.contiguous()
    return parts


def renamed(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A state dict under the names of the hub's files."""
    named = {}
    for key, value in state.items():
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        named[key] = value
    return named
