"""What masked autoencoders' files have in common: an encoder in timm's names, and a decoder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.containers import Container
from models.heads.reconstruct import Reconstruct
from models.networks.masked import drawing_loss
from models.reference_outputs import ReferenceRun
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest

DECODER = ("decoder_", "mask_token")
ENCODER = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")


def decoder_state(container: Container, arguments: Mapping[str, Any]) -> dict[str, HeadState]:
    """The decoder as a head's state, if the file has one."""
    told = {**container.script, **arguments}
    found = {k: value for k, value in container.tensors.items() if k.startswith(DECODER)}
    if "decoder_pred.weight" not in found:
        return {}
    settings = {
        "num_heads": int(told.get("decoder_num_heads", 16)),
        "by_patch": bool(told.get("norm_pix_loss", False)),
        "mask_ratio": float(told.get("mask_ratio", 0.75)),
    }
    return {"decoder": HeadState(found, settings)}


def request(trunk: Trunk) -> FeatureRequest:
    """The last block's output before the norm."""
    return FeatureRequest(layers=frozenset({len(trunk.blocks) - 1}))


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """What fine-tuning would pool at its first step; and with `noise` (B, N) what the decoder
    draws: `reconstruction` (B, N, pixels of a patch), `mask` (B, N), `latent_visible`, `loss`."""
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


def without_decoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's tensors, and all other keys."""
    kept = {key: value for key, value in tensors.items() if key.startswith(ENCODER)}
    return kept, tuple(key for key in tensors if key not in kept)
