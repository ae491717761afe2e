"""transformers' SigLIP, and SigLIP 2 for inputs of one size: both towers, the image tower alone, or
with a classifier."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import whole
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.towers import LIBRARY, tower_states
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    read_beside,
    require,
    require_positions,
    require_size,
    side,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.checkpoints.families.vit import split_prefix, vit_arguments
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

IMAGE: Names = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
TEXT: Names = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^head\.", "text_projection."),
)
PREFIX = "vision_model."  # which transformers 5 leaves out where there is no other tower
BUFFERS = ("position_ids",)
POOL = re.compile(r"^head\.attention\.in_proj_(weight|bias)$")
# transformers' tokenizers by their names in `tokenizer_config.json`, which may end in `Fast`. Files
# of SigLIP 2 name Gemma's, which keeps upper case, though the models were trained without.
TOKENIZERS = {
    "SiglipTokenizer": "siglip",
    "GemmaTokenizer": "siglip-2",
    "Siglip2Tokenizer": "siglip-2",
}
PADDING = {"siglip": "</s>", "siglip-2": "<pad>"}
TOKENIZER_FILE = "tokenizer_config.json"


def _siglip(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    dropped = tuple(k for k in container.tensors if k.endswith(BUFFERS))
    tensors = {k: v for k, v in container.tensors.items() if k not in dropped}
    alone = config["model_type"] == "siglip_vision_model"
    named = any(key.startswith(PREFIX) for key in tensors)
    image, rest = split_prefix(tensors, PREFIX if named or not alone else "")
    vision = _image_state(image)
    arguments = _image_arguments(
        vision, config if alone else config.get("vision_config") or {}, preprocess
    )
    if all(key.startswith("classifier.") for key in rest):
        classifier = {key.replace(".", ".0.", 1): tensors[key] for key in rest}
        head = HeadState(classifier, {"layers": [-1], "mean": "alone"})
        return Checkpoint(
            format=NAME,
            architecture="vit",
            library=OWN,
            arguments=arguments,
            state_dict=vision,
            heads={"linear": head} if classifier else {},
            dropped=dropped,
        )
    text, outer = split_prefix({key: tensors[key] for key in rest}, "text_model.")
    if left := set(outer) - {"logit_scale", "logit_bias"}:
        raise CheckpointError(f"left over: {', '.join(sorted(left)[:10])}")
    language, text_arguments = _text(text, config.get("text_config") or {})
    words = text_arguments["vocab_size"]
    state = tower_states(vision, language, tensors["logit_scale"])
    return Checkpoint(
        format=NAME,
        architecture=f"SigLIP with a ViT of width {arguments['embed_dim']}",
        library=LIBRARY,
        arguments={
            "image": {**arguments, "architecture": "lit-vit"},
            "text": text_arguments,
            "tokenizer": {
                **_tokenizer(container),
                "source": f"a vocabulary of {words} words",
                "words": words,
                "folder": str(container.path.parent.absolute()),
            },
        },
        state_dict={**state, "logit_bias": tensors["logit_bias"]},
        dropped=dropped,
    )


def _image_state(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower under timm's names."""
    joined = {match[1]: image[key] for key in image if (match := POOL.match(key))}
    state = renamed({k: v for k, v in image.items() if not POOL.match(k)}, IMAGE, ".qkv.")
    for kind, value in joined.items():
        width = len(value) // 3
        state[f"attn_pool.q.{kind}"] = value[:width]
        state[f"attn_pool.kv.{kind}"] = value[width:]
    state["pos_embed"] = state["pos_embed"][None]
    return state


def _image_arguments(
    state: Mapping[str, Tensor], config: Mapping[str, Any], preprocess: Preprocess
) -> dict[str, Any]:
    if "attn_pool.latent" not in state:
        raise CheckpointError("vision_use_head is false, which is not supported")
    heads = whole("num_attention_heads", config.get("num_attention_heads", 12))
    network = vit_arguments(state, {"num_heads": heads})
    size = side(config, "image_size", 224)
    require_size(preprocess, size)
    require_positions(size, network)
    _require_as_published(config, network["depth"])
    require(config, num_channels=3, vision_use_head=True)
    return {
        "positions": "bicubic",
        **network,
        "act_layer": "gelu_tanh",
        "class_token": False,
        "global_pool": "map",
    }


def _require_as_published(config: Mapping[str, Any], layers: int) -> None:
    """
    Raises:
        CheckpointError: a tower's activation, epsilon or depth is another one.
    """
    require(
        {"num_hidden_layers": 12, **config},
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        num_hidden_layers=layers,
    )


def _text(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The text tower under open_clip's names, and its arguments."""
    state = renamed(tensors, TEXT, ".in_proj_")
    length, width = state["positional_embedding"].shape
    layers = len({key.split(".")[2] for key in state if ".resblocks." in key})
    _require_as_published(config, layers)
    return state, {
        "architecture": "lit-text",
        "pool_type": "last",
        "context_length": length,
        "vocab_size": len(state["token_embedding.weight"]),
        "width": width,
        "heads": whole("num_attention_heads", config.get("num_attention_heads", 12)),
        "layers": layers,
        "mlp_ratio": mlp_ratio(len(state["transformer.resblocks.0.mlp.c_fc.bias"]), width),
        "output_dim": len(state["text_projection.bias"]),
    }


def _tokenizer(container: Container) -> dict[str, str]:
    """The tokenizer beside a file as arguments of `create_tokenizer`. Images do not need it, so one
    that cannot be used is only named with the reason.

    Raises:
        CheckpointError: its configuration cannot be read.
    """
    config = read_beside(container.path, TOKENIZER_FILE)
    if not config:
        return {"name": "siglip"}  # for the error of texts, if there is none beside the file
    try:
        return {"name": _tokenizer_name(config)}
    except CheckpointError as error:
        return {"name": "unusable", "reason": f"{TOKENIZER_FILE}: {error}"}


def _tokenizer_name(config: Mapping[str, Any]) -> str:
    """
    Raises:
        CheckpointError: it is not a tokenizer of SigLIP or SigLIP 2.
    """
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in TOKENIZERS:
        raise CheckpointError(f"tokenizer_class is {name!r}; supported are {', '.join(TOKENIZERS)}")
    for option, value in (
        ("do_lower_case", True),
        ("add_bos_token", False),
        ("add_eos_token", True),
    ):
        if config.get(option) not in (None, value):
            raise CheckpointError(f"{option} is {config[option]!r}; only {value} is supported")
    # transformers' default is another for those of SigLIP 2
    stated = config.get("padding_side", "right" if name == "SiglipTokenizer" else None)
    if stated != "right":
        raise CheckpointError(f"padding_side is {stated!r}; only 'right' is supported")
    pad = config.get("pad_token", PADDING[TOKENIZERS[name]])
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    if pad != PADDING[TOKENIZERS[name]]:
        raise CheckpointError(
            f"pad_token is {pad!r}; only {PADDING[TOKENIZERS[name]]!r} is supported"
        )
    return TOKENIZERS[name]


CONVERTERS: dict[str, Converter] = {"siglip": _siglip, "siglip_vision_model": _siglip}
