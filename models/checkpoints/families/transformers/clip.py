"""transformers' CLIP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import number, whole
from models.checkpoints.families.open_clip import Configuration
from models.checkpoints.families.open_clip_towers import CLIP_WORDS, convert_towers
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    read_beside,
    require,
    require_size,
    side,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

NAMES: Names = (
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
BUFFERS = ("position_ids",)
# Configurations older than transformers 4.31 have this one, and pool the token of the largest id.
OLD_END = 2


def _clip(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    act = image.get("hidden_act", "quick_gelu")
    if text.get("hidden_act", "quick_gelu") != act:
        raise CheckpointError("the towers have different activations")
    for tower in (image, text):
        if number("layer_norm_eps", tower.get("layer_norm_eps", 1e-5)) != 1e-5:
            raise CheckpointError("layer_norm_eps must be 1e-5, as CLIP has it")
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"hidden_act is {act!r}; it is quick_gelu or gelu")
    require(image, num_channels=3)
    words = whole("vocab_size", text.get("vocab_size", CLIP_WORDS))
    if text.get("eos_token_id", CLIP_WORDS - 1) not in (OLD_END, words - 1):
        raise CheckpointError(
            f"eos_token_id is {text.get('eos_token_id')}; texts are read at their largest id, "
            f"{words - 1}"
        )
    _check_tokenizer(container, words)
    size = side(image, "image_size", 224)
    require_size(preprocess, size)
    kept = {k: v for k, v in container.tensors.items() if not k.endswith(BUFFERS)}
    tensors = renamed(kept, NAMES, ".in_proj_")
    tensors |= {key: tensors[key].T for key in TRANSPOSED if key in tensors}
    width = whole("hidden_size", image.get("hidden_size", 768))
    heads = whole("num_attention_heads", image.get("num_attention_heads", 12))
    vision = _tower(image, 768, 12)
    vision |= {
        "head_width": width // heads,
        "patch_size": side(image, "patch_size", 32),
        "image_size": size,
    }
    language = _tower(text, 512, 8)
    language |= {
        "heads": whole("num_attention_heads", text.get("num_attention_heads", 8)),
        "context_length": whole("max_position_embeddings", text.get("max_position_embeddings", 77)),
        "vocab_size": words,
    }
    model = {
        "embed_dim": whole("projection_dim", config.get("projection_dim", 512)),
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": language,
    }
    transform = {
        "mean": preprocess.mean,
        "std": preprocess.std,
        "interpolation": preprocess.interpolation,
        "resize_mode": "shortest",
    }
    checkpoint = convert_towers(
        NAME, replace(container, tensors=tensors), Configuration(model, transform)
    )
    dropped = tuple(k for k in container.tensors if k.endswith(BUFFERS))
    return replace(checkpoint, dropped=(*checkpoint.dropped, *dropped))


def _tower(config: Mapping[str, Any], width: int, layers: int) -> dict[str, Any]:
    """open_clip's `width`, `layers` and `mlp_ratio`, with transformers' defaults."""
    width = whole("hidden_size", config.get("hidden_size", width))
    inner = whole("intermediate_size", config.get("intermediate_size", 4 * width))
    layers = whole("num_hidden_layers", config.get("num_hidden_layers", layers))
    return {"width": width, "layers": layers, "mlp_ratio": inner / width}


def _check_tokenizer(container: Container, words: int) -> None:
    """
    Raises:
        CheckpointError: the tokenizer beside the file has other words than CLIP's own, in as many
            entries. Larger ones are read from there.
    """
    model = read_beside(container.path, "tokenizer.json").get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if words != CLIP_WORDS or not isinstance(found, dict):
        return
    own = SimpleTokenizer()
    ends = {own.sot_token_id, own.eot_token_id}  # whose names differ
    if {k: v for k, v in found.items() if v not in ends} != {
        k: v for k, v in own.encoder.items() if v not in ends
    }:
        raise CheckpointError("the words of tokenizer.json are not CLIP's, which is not supported")


CONVERTERS: dict[str, Converter] = {"clip": _clip}
