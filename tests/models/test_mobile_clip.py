"""MobileCLIP in Apple's names, against open_clip's networks; what only Apple has is written out."""

import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv1d, gelu, linear

from models import load_checkpoint
from models.errors import CheckpointError
from models.networks.mobile_clip import MixerBlock

IMAGE, TEXT = "image_encoder.model.", "text_encoder."
RENAMED = (
    ("stem.", "patch_embed."), ("conv_kxk", "rbr_conv"), ("conv_scale", "rbr_scale"),
    ("identity", "rbr_skip"), ("final_conv", "conv_exp"), ("large_conv", "lkb_origin"),
    (".mlp.", ".convffn."), ("se.fc1", "se.reduce"), ("se.fc2", "se.expand"),
    ("layer_scale_1.gamma", "layer_scale_1"), ("layer_scale_2.gamma", "layer_scale_2"),
    ("layer_scale.gamma", "layer_scale"), ("head.fc.weight", "head.proj"),
)  # fmt: skip
TEXTS = (
    ("text_projection", "projection_layer"), ("token_embedding", "embedding_layer"),
    ("positional_embedding", "positional_embedding.pos_embed.pos_embed"),
    ("ln_final", "final_layer_norm"), ("ln_1", "pre_norm_mha.0"), ("attn.", "pre_norm_mha.1."),
    ("ln_2", "pre_norm_ffn.0"), ("mlp.c_fc", "pre_norm_ffn.1"), ("mlp.c_proj", "pre_norm_ffn.4"),
    ("in_proj_weight", "qkv_proj.weight"), ("in_proj_bias", "qkv_proj.bias"),
    ("transformer.resblocks.", "transformer."),
)  # fmt: skip
# Of B's image tower, a ViT.
VIT = (
    ("patch_embed.backbone.", "patch_emb."), (".conv.", ".block.conv."), (".bn.", ".block.norm."),
    ("attn.qkv.", "pre_norm_mha.1.qkv_proj."), ("attn.proj.", "pre_norm_mha.1.out_proj."),
    ("norm1.", "pre_norm_mha.0."), ("norm2.", "pre_norm_ffn.0."), ("mlp.fc1.", "pre_norm_ffn.1."),
    ("mlp.fc2.", "pre_norm_ffn.4."), ("blocks.", "transformer."),
    ("head.weight", "classifier.proj"), ("pos_embed", "pos_embed.pos_embed.pos_embed"),
)  # fmt: skip


def in_apples_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """FastViT's stages and what joins them are one list, `network`."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("visual.trunk."):
            name = key.removeprefix("visual.trunk.")
            if "visual.trunk.cls_token" in state:
                named |= in_apples_vit(name, value)
                continue
            name = re.sub(
                r"^stages\.(\d)\.downsample\.", lambda m: f"network.{2 * int(m[1]) - 1}.", name
            )
            name = name.replace("stages.3.pos_emb.pos_enc", "network.6.pe")
            name = re.sub(
                r"^stages\.(\d)\.blocks\.",
                lambda m: f"network.{2 * int(m[1]) + (m[1] == '3')}.",
                name,
            )
            for ours, theirs in RENAMED:
                name = name.replace(ours, theirs)
            if name != "head.fc.bias":  # zeros
                named[f"{IMAGE}{name}"] = value.T if name == "head.proj" else value
        elif key.startswith("text."):
            name = key.removeprefix("text.")
            for ours, theirs in TEXTS:
                name = name.replace(ours, theirs)
            named[f"{TEXT}{name}"] = value
        else:
            named[key] = value
    return named


def in_apples_vit(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of B's image tower; nothing for the bias of its projection, which is zeros."""
    if name == "head.bias":
        return {}
    name = re.sub("^norm.", "post_transformer_norm.", name)
    for ours, theirs in VIT:
        name = name.replace(ours, theirs)
    if name == "classifier.proj":
        value = value.T
    return {f"{IMAGE}{name}": value.unsqueeze(0) if name.startswith("pos_embed") else value}


def as_apple(kind: str) -> Any:
    """open_clip's network with what Apple's has otherwise, and random weights."""
    name = {"S0": "MobileCLIP2-S0"}.get(kind, f"MobileCLIP-{kind}")
    network: Any = open_clip.create_model(name).eval()
    if kind == "S0":
        blocks = [MixerBlock(512), *network.text.transformer.resblocks[:4], MixerBlock(512)]
        network.text.transformer.resblocks = nn.ModuleList(blocks).eval()
    if kind == "B":
        network.visual.trunk.patch_embed.backbone[0].conv.padding = 1
        for module in network.visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
    for key, value in network.state_dict().items():
        if value.is_floating_point() and value.dim() < 2 and key != "logit_scale":
            nn.init.uniform_(value, 0.5, 1.5)
    classifier = network.visual.trunk.get_classifier()
    classifier.bias.data.zero_()
    return network


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "size"), [("S0", 256), ("S1", 256), ("B", 224)])
def test_apples_files_are_open_clips_networks(kind: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = as_apple(kind)
    path = tmp_path / "mobileclip.pt"
    torch.save(in_apples_names(network.state_dict()), path)
    model = load_checkpoint(path)
    assert model.trunk.preprocess.input_size == (size, size)
    assert model.trunk.preprocess.std == (1, 1, 1)
    pixels, ids = torch.rand(1, 3, size, size), torch.randint(1, 49000, (2, 77))
    found = model.run(pixels, ids)
    with torch.inference_mode():
        expected = network.encode_image(pixels), network.encode_text(ids)
    for name, value in zip(("image_embedding", "text_embedding"), expected, strict=True):
        scale = value.abs().max()
        assert torch.allclose(found[name] / scale, value / scale, atol=1e-5), name


def test_what_is_none_of_apples_networks_is_refused(tmp_path: Path) -> None:
    state = {
        f"{IMAGE}patch_embed.0.rbr_conv.0.conv.weight": torch.ones(1, 3, 3, 3),
        f"{TEXT}projection_layer": torch.ones(512, 512),
        f"{TEXT}transformer.0.token_mixer.norm.weight": torch.ones(512),
        "logit_scale": torch.tensor(2.0),
    }
    torch.save(state, tmp_path / "mobileclip_s0.pt")
    with pytest.raises(CheckpointError, match="none of S0, S1, S2, B with all their weights"):
        load_checkpoint(tmp_path / "mobileclip_s0.pt")


def test_texts_are_mixed_along_their_tokens() -> None:
    torch.manual_seed(0)
    block = MixerBlock(6, kernel=5).eval()
    for value in block.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    state, x = block.state_dict(), torch.randn(2, 9, 6)

    def normed(name: str, rows: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return batch_norm(rows, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    def convolved(name: str, rows: Tensor) -> Tensor:
        kernel = state[f"{name}.conv.weight"][:, :, 0]
        return normed(f"{name}.bn", conv1d(rows, kernel, padding=2, groups=6))

    rows = x.transpose(1, 2)
    mixer = normed("token_mixer.mixer.rbr_skip", rows)
    mixer = mixer + convolved("token_mixer.mixer.rbr_conv.0", rows)
    subtracted = normed("token_mixer.norm.rbr_skip", rows)
    rows = rows + state["token_mixer.layer_scale"][..., 0] * (mixer - subtracted)
    tokens = convolved("convffn.conv", rows).transpose(1, 2)
    hidden = linear(tokens, state["convffn.fc1.weight"][..., 0, 0], state["convffn.fc1.bias"])
    out = linear(gelu(hidden), state["convffn.fc2.weight"][..., 0, 0], state["convffn.fc2.bias"])
    expected = rows.transpose(1, 2) + state["layer_scale"][:, 0, 0] * out
    assert torch.allclose(block(x), expected, rtol=1e-5, atol=1e-5)
