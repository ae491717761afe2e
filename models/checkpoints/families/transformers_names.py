"""The names of transformers' weights, in those of timm, of ConvNeXt's authors and of OpenAI."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Patterns and what they become, tried in turn; all that match are applied.
Names = Sequence[tuple[str, str]]

VIT: Names = (
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
CONVNEXT: Names = (
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d)\.layers\.", r"stages.\1."),
    (r"\.layernorm\.", ".norm."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
CLIP: Names = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
)
TRANSPOSED = ("visual.proj", "text_projection")
PARTS = re.compile(r"(.*\.attn)\.(query|q|key|k|value|v)\.(weight|bias)$")


def renamed(tensors: Mapping[str, Tensor], names: Names, joined: str) -> dict[str, Tensor]:
    """A state dict under other names, with queries, keys and values in one matrix.

    Args:
        joined: what follows `attn` in the name of that matrix, before `weight` and `bias`.
    """
    patterns = [(re.compile(pattern), name) for pattern, name in names]
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for pattern, name in patterns:
            key = pattern.sub(name, key)
        if (match := PARTS.match(key)) is not None:
            whole = f"{match[1]}{joined}{match[3]}"
            parts.setdefault(whole, {})[match[2][0]] = value
        else:
            state[key] = value.T if key in TRANSPOSED else value
    for key, three in parts.items():
        state[key] = torch.cat([three["q"], three["k"], three["v"]])
    return state
