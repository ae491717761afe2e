"""open_clip's own checkpoints (arXiv 2212.07143, github.com/mlfoundations/open_clip).

`epoch_K.pt` of its training, and `open_clip_pytorch_model.bin` or `open_clip_model.safetensors` of
the hub. Towers are ViTs, ResNets or timm networks for images, CLIP's transformer or a BERT for
texts. The same keys stand for many networks, so the configuration decides: `open_clip_config.json`
beside the file, or arguments.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.open_clip import FILE, has_configuration, read_configuration
from models.checkpoints.families.open_clip_towers import convert_towers
from models.errors import CheckpointError

NAME = "open-clip"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    """Both towers, a scale, and a configuration; files in OpenAI's layout are also that."""
    keys = container.tensors.keys()
    image = any(key.startswith(("visual.trunk.", "visual.conv1.", "visual.head.")) for key in keys)
    named = any(key.startswith("text.") for key in keys)
    flat = "token_embedding.weight" in keys
    if not image or "logit_scale" not in keys or not (named or flat):
        return None
    if has_configuration(container, arguments):
        return "both towers of a CLIP, and open_clip's configuration"
    return "towers in open_clip's names: visual. and text." if named else None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`, for files without `open_clip_config.json`: open_clip's `architecture`, or
    `embed_dim`, `vision_cfg`, `text_cfg` and `preprocess_cfg`.

    Raises:
        CheckpointError: there is no configuration.
    """
    if not has_configuration(container, arguments):
        raise CheckpointError(
            f"{container.path}: these keys do not tell the activation, the numbers of heads and "
            f"the pooling. Put {FILE} beside the file, or set architecture to open_clip's name "
            "of the model, or embed_dim, vision_cfg and text_cfg to its configuration"
        )
    return convert_towers(NAME, container, read_configuration(container, arguments))
