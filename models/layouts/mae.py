"""What masked autoencoders' files have in common: an encoder in timm's names, and a decoder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm

from models.architectures.masked import MaskedDecoder, drawing_loss, encode_visible
from models.checkpoint import HeadState
from models.model import Model
from models.need import Need
from models.strict import load_strictly
from models.trunk import Trunk, TrunkOutput

DECODER = ("decoder_", "mask_token")
ENCODER = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")


def decoder_state(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> dict[str, HeadState]:
    """The decoder as a head's state, if the file has one."""
    found = {key: value for key, value in tensors.items() if key.startswith(DECODER)}
    if "decoder_pred.weight" not in found:
        return {}
    settings = {
        "num_heads": int(arguments.get("decoder_num_heads", 16)),
        "by_patch": bool(arguments.get("norm_pix_loss", False)),
        "mask_ratio": float(arguments.get("mask_ratio", 0.75)),
    }
    return {"decoder": HeadState(found, settings)}


def create_decoder(state: HeadState) -> MaskedDecoder:
    """The decoder with its weights, frozen.

    Raises:
        CheckpointError: they do not fit together.
    """
    tensors = state.tensors
    dim, width = tensors["decoder_embed.weight"].shape
    depth = len({k.split(".")[1] for k in tensors if k.startswith("decoder_blocks.")})
    decoder = MaskedDecoder(
        width,
        dim,
        depth,
        state.settings["num_heads"],
        tensors["decoder_pos_embed"].shape[1] - 1,
        tensors["decoder_pred.weight"].shape[0],
    )
    load_strictly(decoder, tensors, "the decoder")
    return decoder.eval().requires_grad_(False)


def need(trunk: Trunk) -> Need:
    """The last block's output before the norm."""
    return Need(layers=frozenset({len(trunk.blocks) - 1}))


def outputs(model: Model, output: TrunkOutput, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What fine-tuning would pool at its first step; and with `noise` (B, N) what the decoder
    draws: `reconstruction` (B, N, pixels of a patch), `mask` (B, N), `latent_visible`, `loss`."""
    [last] = output.layers.values()
    mean = last[:, output.prefix :].mean(1)
    named = {"embedding_global_pool": layer_norm(mean, mean.shape[-1:], eps=1e-6)}
    state = model.states.get("decoder")
    if state is None or "noise" not in inputs:
        return named
    network: Any = model.trunk.network
    pixels = inputs["pixel_values"]
    visible = encode_visible(network, pixels, inputs["noise"], state.settings["mask_ratio"])
    drawn = create_decoder(state).to(pixels.device)(visible)
    by_patch = state.settings["by_patch"]
    return named | {
        "latent_visible": visible.latent,
        "mask": visible.mask,
        "reconstruction": drawn,
        "loss": drawing_loss(drawn, pixels, visible.mask, by_patch),
    }


def without_decoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's tensors, and all other keys."""
    kept = {key: value for key, value in tensors.items() if key.startswith(ENCODER)}
    return kept, tuple(key for key in tensors if key not in kept)
