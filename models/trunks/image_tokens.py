"""The tokens of open_clip's image towers, whose pass otherwise yields the embedding alone."""

from collections.abc import Sequence
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from models.errors import InputError

# The class token of open_clip's ViT.
CLASS_TOKENS = 1


def block_count(tower: nn.Module) -> int:
    """Blocks whose outputs `tower_tokens` can return."""
    return len(tower.transformer.resblocks) if isinstance(tower, VisionTransformer) else 0


def prefix_tokens(tower: Any) -> int | None:
    """Class and register tokens before the patch tokens; None if the tower has no patch tokens."""
    if isinstance(tower, VisionTransformer):
        return CLASS_TOKENS
    if isinstance(tower, TimmModel):
        return int(getattr(tower.trunk, "num_prefix_tokens", 0))
    return None


def token_values(tower: Any) -> int:
    """Numbers in all tokens of an image; 0 if it is not known before a pass."""
    table = getattr(tower, "positional_embedding", None)
    return table.numel() if isinstance(table, Tensor) else 0


def check_layers(architecture: str, count: int, layers: Sequence[int]) -> None:
    """Check the numbers of the blocks to read.

    Raises:
        InputError: no such block, or the blocks cannot be read.
    """
    if layers and not count:
        raise InputError(f"the layers of {architecture} cannot be read", field="layers")
    if wrong := [number for number in layers if not 0 <= number < count]:
        raise InputError(
            f"layers has {wrong[0]}; {architecture} has 0 to {count - 1}", field="layers"
        )


def tower_tokens(tower: Any, pixels_BCHW: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    """`embedding` (B, D), `tokens` and, for each of `layers`, `layers.N`.

    Tokens are (B, T, W), or a feature map (B, W, h, w), W being the tower's width: those that the
    pooling takes, after the final norm unless it comes after the pooling, and before the projection
    to the shared space. Those of a block are before any norm.
    """
    if isinstance(tower, TimmModel):
        tokens = tower.trunk.forward_features(pixels_BCHW)
        pooled = tower.head(tower.trunk.forward_head(tokens))
        if tokens.dim() == 4 and getattr(tower.trunk, "output_fmt", "NCHW") == "NHWC":
            tokens = tokens.permute(0, 3, 1, 2)
        return {"embedding": pooled, "tokens": tokens}
    x = tower._embeds(pixels_BCHW)
    x, outputs = tower.transformer.forward_intermediates(x, indices=list(layers) or 1)
    pooled = tower._pool(x)[0]
    if tower.proj is not None:
        pooled = pooled @ tower.proj
    normed = tower.attn_pool is None and not tower.final_ln_after_pool
    named = {f"layers.{number}": output for number, output in zip(layers, outputs, strict=False)}
    return {"embedding": pooled, "tokens": tower.ln_post(x) if normed else x, **named}
