"""MobileCLIP in Apple's names, against open_clip's networks."""

import re
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from models import load_checkpoint
from models.errors import CheckpointError

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


def in_apples_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """FastViT's stages and what joins them are one list, `network`."""
    named = {}
    for key, value in state.items():
        if key.startswith("visual.trunk."):
            name = key.removeprefix("visual.trunk.")
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


@pytest.mark.nightly
def test_apples_files_are_open_clips_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = open_clip.create_model("MobileCLIP-S1").eval()
    for key, value in network.state_dict().items():
        if value.is_floating_point() and value.dim() < 2 and key != "logit_scale":
            torch.nn.init.uniform_(value, 0.5, 1.5)
    network.visual.trunk.head.fc.bias.data.zero_()
    path = tmp_path / "mobileclip_s1.pt"
    torch.save(in_apples_names(network.state_dict()), path)
    model = load_checkpoint(path)
    assert model.trunk.preprocess.input_size == (256, 256)
    assert model.trunk.preprocess.std == (1, 1, 1)
    pixels, ids = torch.rand(1, 3, 256, 256), torch.randint(1, 49000, (2, 77))
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
    with pytest.raises(CheckpointError, match="S0 and B are not supported"):
        load_checkpoint(tmp_path / "mobileclip_s0.pt")
