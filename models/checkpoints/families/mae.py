"""Masked autoencoders (MAE, arXiv 2111.06377, github.com/facebookresearch/mae).

Their files hold an encoder in timm's names, and may hold a decoder under `decoder_`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, number, whole
from models.heads.reconstruct import Reconstruct
from models.networks.masked import drawing_loss
from models.reference_outputs import ReferenceRun
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest

DECODER = ("decoder_", "mask_token")
ENCODER = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")


def decoder_state(container: Container, arguments: Mapping[str, Any]) -> dict[str, HeadState]:
    """The decoder as the head `decoder`; empty if the file has none.

    Args:
        arguments: `decoder_num_heads` (16), `norm_pix_loss` (false) and `mask_ratio` (0.75); the
            training script's arguments in the file are the defaults.
    """
    config = {**container.script, **arguments}
    decoder = {k: value for k, value in container.tensors.items() if k.startswith(DECODER)}
    if "decoder_pred.weight" not in decoder:
        return {}
    settings = {
        "num_heads": whole("decoder_num_heads", config.get("decoder_num_heads", 16)),
        "by_patch": flag("norm_pix_loss", config.get("norm_pix_loss", False)),
        "mask_ratio": number("mask_ratio", config.get("mask_ratio", 0.75)),
    }
    return {"decoder": HeadState(decoder, settings)}


def request(trunk: Trunk) -> FeatureRequest:
    """The last block's output, before the norm."""
    return FeatureRequest(layers=frozenset({len(trunk.blocks) - 1}))


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding_global_pool` (B, D), which fine-tuning starts from; with a decoder and `noise`
    (B, N) also `reconstruction` (B, N, P), `mask` (B, N), `latent_visible` (B, 1 + V, D), `loss`.
    """
    [last] = run.output.layers.values()
    mean = last[:, run.output.prefix :].mean(1)
    named = {"embedding_global_pool": layer_norm(mean, mean.shape[-1:], eps=1e-6)}
    head = run.heads.get("reconstruct")
    if not isinstance(head, Reconstruct) or "noise" not in run.inputs:
        return named
    pixels = run.inputs["pixel_values"]
    visible = head.encode(pixels, run.inputs["noise"], None)
    drawn = head.network(visible)
    return named | {
        "latent_visible": visible.latent,
        "mask": visible.mask,
        "reconstruction": drawn,
        "loss": drawing_loss(drawn, pixels, visible.mask, head.by_patch),
    }


def decoder_assumed(
    heads: Mapping[str, HeadState], container: Container, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of the decoder's settings that neither the script nor the arguments state."""
    if "decoder" not in heads:
        return {}
    settings, config = heads["decoder"].settings, {**container.script, **arguments}
    named = {"decoder_num_heads": "num_heads", "norm_pix_loss": "by_patch",
             "mask_ratio": "mask_ratio"}  # fmt: skip
    return {name: settings[key] for name, key in named.items() if name not in config}


def without_decoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's tensors, and the keys of all others."""
    kept = {key: value for key, value in tensors.items() if key.startswith(ENCODER)}
    return kept, tuple(key for key in tensors if key not in kept)
