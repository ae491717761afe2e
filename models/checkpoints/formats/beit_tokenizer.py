"""BEiT v2's tokenizers (VQ-KD, arXiv 2208.06366, github.com/microsoft/unilm).

A BEiT names each patch by a code, and a decoder predicts a teacher's features from codes. The
teacher is in the file of a training run; it is not used.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import HALF, STATISTICS, beit_checkpoint
from models.checkpoints.families.vit import split_prefix
from models.checkpoints.strict import check_strictly, load_strictly
from models.errors import CheckpointError
from models.networks import create_own
from models.networks.beit import Beit
from models.reference_outputs import ReferenceRun

NAME = "beit-tokenizer"
CODEBOOK = "quantize.embedding.weight"
KEPT = (CODEBOOK, "encode_task_layer.", "decode_task_layer.", "decoder.")
TRAINING = ("teacher_model.", "scaling_layer.", "quantize.")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if {CODEBOOK, "encode_task_layer.0.weight", "encoder.cls_token"} <= container.tensors.keys():
        return "an encoder, a decoder and a codebook under quantize"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `num_heads` (channels / 64, assumed).

    Raises:
        CheckpointError: the encoder or the decoder is not complete.
    """
    encoder, rest = split_prefix(container.tensors, "encoder.")
    decoder, _ = split_prefix(container.tensors, "decoder.")
    if "fc_norm.weight" not in encoder or "fc_norm.weight" not in decoder:
        raise CheckpointError("the encoder or the decoder has no fc_norm")
    arguments = {**arguments, STATISTICS: False}  # pixels are scaled to -1..1 in upstream's code
    checkpoint = beit_checkpoint(NAME, container, encoder, arguments, global_pool="avg")
    built = beit_checkpoint(NAME, container, decoder, arguments, global_pool="avg").arguments
    settings = {"decoder": {**built, "in_chans": decoder["patch_embed.proj.weight"].shape[1]}}
    state = {k: v for k, v in container.tensors.items() if k.startswith(KEPT)}
    _check(state, checkpoint.arguments["embed_dim"], settings["decoder"])
    assert checkpoint.preprocess is not None
    return replace(
        checkpoint,
        heads={"codes": HeadState(state, settings)},
        preprocess=replace(checkpoint.preprocess, crop_pct=1.0, mean=HALF, std=HALF),
        dropped=(
            *(f"encoder.{key}" for key in checkpoint.dropped),
            *(key for key in rest if key not in state and key.startswith(TRAINING)),
        ),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`pre_quantize` (B, N, C) of each patch; `code_ids` (B, N), the nearest codes by cosine;
    `feature_map` (B, C, h, w), the codes' unit vectors; `reconstruction` (B, N, teacher's D)."""
    network: Beit = run.network
    codes = run.states["codes"]
    tensors = codes.tensors
    patches, grid = network.embed(run.inputs["pixel_values"])
    features = network.fc_norm(network.encode(patches, grid)[-1][:, 1:])
    projected = _task_layer(tensors, "encode_task_layer", features)
    book = normalize(tensors[CODEBOOK], dim=-1)
    ids = (normalize(projected, dim=-1) @ book.T).argmax(-1)
    quantized = torch.unflatten(tensors[CODEBOOK][ids].transpose(1, 2), 2, grid)
    decoder = create_own("beit", **codes.settings["decoder"])
    assert isinstance(decoder, Beit)
    state, _ = split_prefix(tensors, "decoder.")
    load_strictly(decoder, state, "the decoder")
    decoded = decoder.encode(*decoder.eval().embed(quantized))[-1]
    return {
        "pre_quantize": projected,
        "code_ids": ids,
        "feature_map": quantized,
        "reconstruction": _task_layer(
            tensors, "decode_task_layer", decoder.fc_norm(decoded[:, 1:])
        ),
    }


def _task_layer(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """(B, N, outputs) of (B, N, inputs)."""
    state, _ = split_prefix(tensors, f"{name}.")
    layer = _create_task_layer(state, x.shape[-1])
    load_strictly(layer, state, name)
    result: Tensor = layer(x)
    return result


def _create_task_layer(state: Mapping[str, Tensor], inputs: int) -> nn.Sequential:
    """Linear, tanh, linear, without their weights."""
    hidden, outputs = len(state["0.weight"]), len(state["2.weight"])
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def _check(tensors: Mapping[str, Tensor], encoder: int, decoder: Mapping[str, Any]) -> None:
    """Check the parts that no trunk has: the codes, the decoder, and the layers around them.

    Args:
        encoder: the encoder's channels.
        decoder: the decoder's arguments.
    """
    state, _ = split_prefix(tensors, "decoder.")
    with torch.device("meta"):
        network = create_own("beit", **decoder)
    check_strictly(network, state, "the decoder")
    for name, inputs in (
        ("encode_task_layer", encoder),
        ("decode_task_layer", decoder["embed_dim"]),
    ):
        state, _ = split_prefix(tensors, f"{name}.")
        check_strictly(_create_task_layer(state, inputs), state, name)
    size = tensors[CODEBOOK].shape[1:]
    if size != tensors["encode_task_layer.2.bias"].shape or size != (decoder["in_chans"],):
        raise CheckpointError(
            f"the codes have {tuple(size)} channels; encode_task_layer or the decoder has others"
        )
