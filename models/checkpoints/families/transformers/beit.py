"""transformers' BEiT, and data2vec's network of images, which is the same."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import beit_checkpoint
from models.checkpoints.families.known import flag, number, whole
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

NAMES: Names = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.attention\.(q|v)\w+\.bias$", r".attn.\1_bias"),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^classifier\.", "head."),
)
PREFIXES = {"beit": "beit.", "data2vec-vision": "data2vec_vision."}
DEFAULTS = {
    "num_hidden_layers": 12,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
}
DROPPED = ("embeddings.mask_token",)


def _beit(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    if any(key.startswith("lm_head.") for key in container.tensors):
        raise CheckpointError("pre-trained for masked images; its pooling is not trained")
    kept, dropped = split(container.tensors, PREFIXES[config["model_type"]], DROPPED)
    pools = flag("use_mean_pooling", config.get("use_mean_pooling", True))
    heads = whole("num_attention_heads", config.get("num_attention_heads"))
    checkpoint = beit_checkpoint(
        NAME,
        container,
        renamed(kept, NAMES, ".qkv."),
        {"num_heads": heads},
        global_pool="avg" if pools else "token",
        dropped=dropped,
    )
    network = checkpoint.arguments
    require(
        {**DEFAULTS, **config, "image_size": side(config, "image_size", 224)},
        hidden_act="gelu",
        num_channels=3,
        num_hidden_layers=network["depth"],
        image_size=network["img_size"],
        use_absolute_position_embeddings=network["use_abs_pos_emb"],
        use_relative_position_bias=network["use_rel_pos_bias"],
        use_shared_relative_position_bias=network["use_shared_rel_pos_bias"],
        head_dim=network["embed_dim"] // heads,
    )
    require_size(preprocess, network["img_size"])
    eps = number("layer_norm_eps", config.get("layer_norm_eps", 1e-12))
    return replace(checkpoint, arguments={**network, "norm_eps": eps}, assumed={})


CONVERTERS: dict[str, Converter] = {"beit": _beit, "data2vec-vision": _beit}
