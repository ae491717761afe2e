"""Both towers of an open_clip model, from its weights and its configuration."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.hf_text import hf_arguments
from models.checkpoints.families.open_clip import OPENAI_SETTINGS, Configuration
from models.checkpoints.families.towers import LIBRARY
from models.errors import CheckpointError

# CLIP's text tower may lie at the top level.
TEXT = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
DECODER = "text_decoder."  # of CoCa, for captions
POSITION_IDS = "text.transformer.embeddings.position_ids"  # a constant of older BERTs
# CLIP's own tokenizer, and the options that it has.
CLIP_WORDS = 49408
CLIP_OPTIONS = {"clean", "reduction_mask", "additional_special_tokens"}


def convert_towers(name: str, container: Container, config: Configuration) -> Checkpoint:
    """Both towers as a checkpoint of format `name`."""
    state: dict[str, Tensor] = {}
    dropped = []
    for key, value in container.tensors.items():
        key = f"text.{key}" if key.startswith(TEXT) else key
        if key.startswith(DECODER) or key == POSITION_IDS or key in OPENAI_SETTINGS:
            dropped.append(key)
        elif key.startswith("visual."):
            state[key.replace("visual.", "image.", 1)] = value
        else:
            state[key] = value
    if "logit_scale" not in state:
        raise CheckpointError(f"{container.path}: the weight logit_scale is missing")
    vision, language = config.model["vision_cfg"], config.model["text_cfg"]
    shared = {"embed_dim": config.model["embed_dim"], "quick_gelu": config.quick_gelu}
    assumed = dict(config.assumed)
    if language.get("hf_model_name"):
        text, heads = hf_arguments(container, state, language, shared["embed_dim"])
        assumed |= heads
    else:
        text = {"architecture": "open-clip-text", **shared, "config": dict(language)}
    network = vision.get("timm_model_name") or f"a ViT of width {vision.get('width', 768)}"
    return Checkpoint(
        format=name,
        library=LIBRARY,
        architecture=f"CLIP with {network}",
        arguments={
            "image": {"architecture": "open-clip-image", **shared, "config": dict(vision)},
            "text": text,
            "tokenizer": _tokenizer(container, language),
        },
        state_dict=state,
        preprocess=config.transform,
        dropped=tuple(dropped),
        assumed=assumed,
    )


def _tokenizer(container: Container, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_tokenizer`. Vocabularies of another size than CLIP's are the hub's."""
    options = dict(config.get("tokenizer_kwargs") or {})
    words = config.get("vocab_size", CLIP_WORDS)
    own = words == CLIP_WORDS and options.keys() <= CLIP_OPTIONS
    source = config.get("hf_tokenizer_name")
    return {
        "name": "open_clip" if own and not source else "hub",
        "context_length": config.get("context_length", 77),
        "source": source or f"a vocabulary of {words} words",
        "mode": config.get("tokenizer_mode"),
        "options": options,
        "folder": str(container.path.parent.absolute()),
    }
