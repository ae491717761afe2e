"""Checkpoints of segmentation and depth: what their configurations say, and what is refused."""

import json
import pprint
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm

from models import load_checkpoint
from models.checkpoints.containers import open_container
from models.checkpoints.families.backbones.swin import _unfolded
from models.checkpoints.families.configuration import read_configuration
from models.checkpoints.families.segmentors import read_segmentor
from models.checkpoints.formats.mmseg import in_segmenters_names
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError, InputError
from models.heads.depth import Depth
from models.networks.beit import Beit, DistilledBeit
from models.networks.depth_decoders import create_depth_decoder
from models.networks.dpt import with_class_token
from models.networks.padded_swin import PaddedSwin
from models.networks.vit import RULES, Vit
from models.segmentation.decoders import create_decoder
from models.segmentation.decoders.dpt import DptHead
from models.segmentation.decoders.necks import TinyMimNeck
from models.segmentation.decoders.segmenter import MaskTransformer
from models.segmentation.windows import Windows
from tests.models.test_fixtures import fixture, folder_of

Change = Callable[[dict[str, Any]], object]


def content(name: str) -> dict[str, Any]:
    """A fixture's file."""
    loaded: dict[str, Any] = torch.load(folder_of(name) / "checkpoint.pth", weights_only=False)
    return loaded


def model_of(loaded: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a file, as data."""
    meta = loaded["meta"]
    return read_configuration(meta.get("cfg") or meta["config"])


def rewritten(name: str, change: Change, tmp_path: Path) -> Path:
    """A fixture's file with its configuration changed."""
    loaded = content(name)
    config = model_of(loaded)
    change(config)
    key = "cfg" if "cfg" in loaded["meta"] else "config"
    loaded["meta"][key] = "\n".join(f"{k} = {pprint.pformat(v)}" for k, v in config.items())
    torch.save(loaded, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def randomize(module: nn.Module) -> nn.Module:
    """Random weights of every kind, for networks without those of a checkpoint."""
    for parameter in module.parameters():
        scale = 0.3 if parameter.dim() < 2 else max(1, parameter[0].numel()) ** -0.5
        nn.init.normal_(parameter, std=scale)
    return module.eval()


# -- configurations ----------------------------------------------------------------------------


def test_both_runners_containers_say_the_same(tmp_path: Path) -> None:
    loaded = content("seg_convnext_mmengine")
    meta = loaded["meta"]
    data = meta.pop("dataset_meta")
    text = meta.pop("cfg") + "\nimg_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6], to_rgb=True)\n"
    old = text.replace("data_preprocessor=dict(", "unused=dict(").replace("scale=", "img_scale=")
    loaded["meta"] = {**meta, "config": old, "CLASSES": data["classes"], "PALETTE": data["palette"]}
    torch.save(loaded, tmp_path / "old.pth")
    new = read_segmentor(open_container(folder_of("seg_convnext_mmengine") / "checkpoint.pth"), {})
    older = read_segmentor(open_container(tmp_path / "old.pth"), {})
    assert new.mean == pytest.approx((0.485, 0.456, 0.406))
    assert older.mean == pytest.approx((1 / 255, 2 / 255, 3 / 255))
    for config in (new, older):
        assert config.scale == (384, 96)
        assert config.keep_ratio
        assert config.labels == [f"class{number}" for number in range(7)]
        assert config.test_cfg.values["crop_size"] == [64, 96]
    pixels = torch.randn(1, 3, 100, 130)
    by_new, _, _ = fixture("seg_convnext_mmengine")
    by_old = load_checkpoint(tmp_path / "old.pth")
    assert torch.equal(by_new.run(pixels)["mask_logits"], by_old.run(pixels)["mask_logits"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["decode_head"].update(align_corners=True), "align_corners is True"),
        (
            lambda c: c["model"]["decode_head"].update(type="ASPPHead"),
            "ASPPHead; supported",
        ),
        (lambda c: c["model"]["decode_head"].update(act_cfg={"type": "GELU"}), "act_cfg is 'GELU'"),
        (lambda c: c["model"]["decode_head"].update(in_index=[0, 9]), "there are 4 levels"),
        (lambda c: c["model"]["backbone"].update(qk_scale=0.5), "qk_scale is 0.5"),
        (lambda c: c.update(img_norm_cfg={"mean": [1, 1, 1], "to_rgb": False}), "only RGB"),
        (lambda c: c["model"].pop("decode_head"), "does not say decode_head.in_index"),
        (lambda c: c["model"]["test_cfg"].update(mode="slide"), "does not say test_cfg.crop_size"),
        (lambda c: c["model"].pop("test_cfg"), "does not say test_cfg.mode"),
        (lambda c: c.update(test_pipeline=[{"type": "Pad", "size": 9}]), "test pipeline has Pad"),
        (lambda c: c["model"].update(type="CascadeEncoderDecoder"), "is a CascadeEncoderDecoder"),
        (
            lambda c: c["model"]["decode_head"].update(norm_cfg={"type": "BN", "eps": 1e-3}),
            r"norm_cfg\.eps is 0\.001",
        ),
        (
            lambda c: c.update(
                data_preprocessor={"mean": [1, 1, 1], "test_cfg": {"size_divisor": 32}}
            ),
            "pads images",
        ),
    ],
)
def test_what_is_not_known_or_not_supported_is_refused(
    change: Change, message: str, tmp_path: Path
) -> None:
    path = rewritten("seg_upernet_swin_mmseg", change, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_blocks_that_a_decoder_reads_are_not_guessed(tmp_path: Path) -> None:
    path = rewritten("seg_upernet_vit_mln", lambda config: config.clear(), tmp_path)
    with pytest.raises(CheckpointError, match=r"backbone\.out_indices.*\[2, 5, 8, 11\] of 12"):
        load_checkpoint(path)
    tables = {
        "backbone": {"out_indices": [0, 1, 2, 3], "num_heads": 3, "img_size": 64},
        "neck": {"scales": [4, 2, 1, 0.5]},
        "decode_head": {"in_index": [0, 1, 2, 3]},
        "test_cfg": {"mode": "whole"},
    }
    found = read_checkpoint(path, tables).assumed
    assert found["backbone.interpolate_mode"] == "bicubic"
    assert found["backbone.norm_cfg.eps"] == 1e-6
    assert found["decode_head.pool_scales"] == (1, 2, 3, 6)
    assert found["scale"] == [2048, 512]


def test_views_that_would_be_averaged_are_assumed_to_be_one(tmp_path: Path) -> None:
    step = {"type": "MultiScaleFlipAug", "img_scale": (256, 64), "img_ratios": [0.5, 1.0],
            "flip": True, "transforms": [{"type": "Resize", "keep_ratio": True}]}  # fmt: skip
    path = rewritten("seg_setr_naive", lambda config: config.update(test_pipeline=[step]), tmp_path)
    assumed = read_checkpoint(path, {}).assumed
    assert (assumed["img_ratios"], assumed["flip"]) == ([1.0], False)


def test_a_dpt_head_reads_class_tokens_of_the_backbone(tmp_path: Path) -> None:
    """And the head says how, where no weight does."""
    loaded = content("seg_setr_naive")
    config = model_of(loaded)
    config["model"]["backbone"]["output_cls_token"] = True
    state = {k: v for k, v in loaded["state_dict"].items() if k.startswith("backbone.")}
    head = DptHead(48, [4, 4, 4, 4], 8, 5, "ignore", norm=True)
    state |= {f"decode_head.{key}": value for key, value in head.state_dict().items()}
    for readout, message in (("ignore", ""), ("sum", "readout is 'sum'")):
        config["model"]["decode_head"] = {"type": "DPTHead", "in_index": [0, 1, 2, 3],
                                          "readout_type": readout}  # fmt: skip
        text = "\n".join(f"{k} = {pprint.pformat(v)}" for k, v in config.items())
        torch.save({"meta": {"config": text}, "state_dict": state}, tmp_path / "dpt.pth")
        if message:
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(tmp_path / "dpt.pth")
            continue
        model = load_checkpoint(tmp_path / "dpt.pth")
        pixels = torch.randn(1, 3, 64, 64)
        assert model.run(pixels)["mask_logits_lowres"].shape == (1, 5, 32, 32)
    config["model"]["backbone"]["output_cls_token"] = False
    text = "\n".join(f"{k} = {pprint.pformat(v)}" for k, v in config.items())
    torch.save({"meta": {"config": text}, "state_dict": state}, tmp_path / "dpt.pth")
    with pytest.raises(CheckpointError, match="output_cls_token is False"):
        load_checkpoint(tmp_path / "dpt.pth")


def test_the_resizing_of_test_pipelines_is_read() -> None:
    windows = Windows(scale=(64, 48), keep_ratio=False)
    assert windows.resized(1000, 10) == (64, 48)
    small = Windows(scale=(64, 64), crop=(64, 64), stride=(32, 32), pads=False)
    assert small.padded(40, 50) == (40, 50)
    assert small.boxes(40, 50) == [(0, 0, 50, 40)]
    assert Windows(scale=(64, 64), crop=(64, 64)).padded(40, 50) == (64, 64)


def test_an_input_smaller_than_a_fixed_window_is_refused() -> None:
    model, _, _ = fixture("seg_fcn_beit")
    with pytest.raises(InputError, match=r"windows are \(64, 64\) and no smaller"):
        model.run(torch.randn(1, 3, 48, 96))
    flexible, _, _ = fixture("seg_setr_naive")
    assert flexible.run(torch.randn(1, 3, 48, 96))["mask_logits"].shape[2:] == (48, 96)


# -- backbones ---------------------------------------------------------------------------------


def test_a_padded_swin_is_timms_where_nothing_is_padded() -> None:
    sizes: dict[str, Any] = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)}
    own = randomize(PaddedSwin(patch_size=4, window_size=4, mlp_ratio=4, **sizes))
    reference = SwinTransformer(64, 4, window_size=4, num_classes=0, **sizes).eval()
    reference.load_state_dict(own.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = own.get_submodule("norm") and own.forward_features(pixels)  # type: ignore[operator]
        expected = reference.forward_features(pixels).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_swin_may_have_absolute_positions(tmp_path: Path) -> None:
    """A constant table is as the bias of the norm before it."""
    loaded = content("seg_upernet_swin_mmseg")
    model = model_of(loaded)["model"]
    model["backbone"]["pretrain_img_size"] = 64
    loaded["meta"]["config"] = f"model = {model!r}"
    state, constant = loaded["state_dict"], torch.rand(1, 12, 1, 1)
    bias = state["backbone.patch_embed.norm.bias"]
    bias += constant.flatten()
    torch.save(loaded, tmp_path / "bias.pth")
    bias -= constant.flatten()

    def run(table: Tensor, pixels: Tensor) -> Tensor:
        state["backbone.absolute_pos_embed"] = table
        torch.save(loaded, tmp_path / "table.pth")
        return load_checkpoint(tmp_path / "table.pth").run(pixels)["mask_logits"]

    same, larger = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 72, 96)
    expected = load_checkpoint(tmp_path / "bias.pth").run(larger)["mask_logits"]
    assert torch.allclose(run(constant.repeat(1, 1, 16, 16), larger), expected, atol=1e-5)
    varied = torch.randn(1, 12, 16, 16)
    by_patch = varied.flatten(2).transpose(1, 2)  # mmsegmentation's
    assert torch.equal(run(by_patch, same), run(varied, same))
    with pytest.raises(InputError, match="no smaller"):
        run(by_patch, torch.randn(1, 3, 40, 40))


def test_heads_may_have_group_norms(tmp_path: Path) -> None:
    loaded = content("seg_upernet_swin_mmseg")
    state = {
        key.replace(".bn.", ".gn.") if key.startswith("decode_head.") else key: value
        for key, value in loaded["state_dict"].items()
        if not (key.startswith("decode_head.") and ".running_" in key)
    }
    state = {key: value for key, value in state.items() if not key.endswith("batches_tracked")}
    loaded["state_dict"] = state

    def load(norm: dict[str, Any]) -> Any:
        config = model_of(loaded)
        config["model"]["decode_head"]["norm_cfg"] = norm
        loaded["meta"]["config"] = "\n".join(f"{k} = {v!r}" for k, v in config.items())
        torch.save(loaded, tmp_path / "groups.pth")
        return load_checkpoint(tmp_path / "groups.pth")

    decoder = load({"type": "GN", "num_groups": 4}).heads["segment"].network
    x, prefix = torch.randn(1, 12, 9, 9), "decode_head.lateral_convs.0"
    weight, bias = state[f"{prefix}.gn.weight"], state[f"{prefix}.gn.bias"]
    normed = group_norm(conv2d(x, state[f"{prefix}.conv.weight"]), 4, weight, bias)
    assert torch.allclose(decoder.decode_head.lateral_convs[0](x), normed.relu(), atol=1e-6)
    with pytest.raises(CheckpointError, match="num_groups is None"):
        load({"type": "GN"})
    with pytest.raises(CheckpointError, match="does not say their groups"):
        load({"type": "BN"})
    with pytest.raises(CheckpointError, match="incomplete"):
        load({"type": "GN", "num_groups": 5})


@pytest.mark.parametrize("size", [(61, 64), (40, 90), (7, 5)])
def test_swins_pixels_beyond_the_input_are_zeros(size: tuple[int, int]) -> None:
    """Padding to whole patches at the bottom and on the right changes nothing."""
    network = PaddedSwin(
        patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=3, mlp_ratio=2
    )
    randomize(network)
    pixels = torch.randn(1, 3, *size)
    whole = nn.functional.pad(pixels, (0, -size[1] % 4, 0, -size[0] % 4))
    with torch.no_grad():
        found, expected = network.forward_features(pixels), network.forward_features(whole)
    assert torch.equal(found, expected)
    assert found.shape[2:] == tuple(-(-side // 8) for side in size)


def test_merged_patches_are_ordered_as_an_unfolding_orders_them() -> None:
    weight = torch.randn(6, 4 * 5)
    x = torch.randn(1, 5, 4, 6)
    expected = nn.Unfold(2, stride=2)(x).transpose(1, 2) @ weight.T
    corners = [x[..., down::2, across::2] for across in (0, 1) for down in (0, 1)]
    joined = torch.cat(corners, 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(joined @ _unfolded(weight).T, expected)


def test_as_many_positions_in_another_grid_stay_as_they_are() -> None:
    cells = torch.randn(1, 6, 4, 4)
    for mode in ("bicubic", "bilinear"):
        rule = RULES[f"{mode}-by-count"]
        assert torch.equal(rule(cells, (2, 8)).flatten(2), cells.flatten(2))
        assert rule(cells, (3, 5)).shape == (1, 6, 3, 5)


@pytest.mark.parametrize(("padding", "start"), [("corner", (0, 0)), ("center", (2, 3))])
def test_inputs_are_padded_with_zeros_to_whole_patches(
    padding: str, start: tuple[int, int]
) -> None:
    network = Vit(
        positions="bicubic", padding=padding, img_size=32, patch_size=8, embed_dim=16, depth=1,
        num_heads=2, num_classes=0,
    ).eval()  # fmt: skip
    pixels = torch.randn(1, 3, 28, 41)
    whole = torch.zeros(1, 3, 32, 48)
    whole[..., start[0] : start[0] + 28, start[1] : start[1] + 41] = pixels
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), network(whole))


@pytest.mark.parametrize(
    "options",
    [
        {"use_abs_pos_emb": True, "use_rel_pos_bias": False},
        {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "qkv_bias": False},
        {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": None},
        {"use_abs_pos_emb": True, "use_rel_pos_bias": True, "global_pool": "token"},
        {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "num_classes": 0},
    ],
)
def test_beits_may_be_fine_tuned_with_fewer_options(
    options: dict[str, Any], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
        "num_classes": 5, "init_values": 0.1, "qkv_bias": True, "global_pool": "avg", **options,
    }  # fmt: skip
    network = randomize(Beit(**arguments))
    torch.save({"model": network.state_dict()}, tmp_path / "beit.pth")
    model = load_checkpoint(tmp_path / "beit.pth", {"num_heads": 3})
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = network.forward_features(pixels)  # type: ignore[operator]
        logits = network(pixels)
    found = model.run(pixels)
    torch.testing.assert_close(found["tokens"], features)
    if arguments["num_classes"]:
        torch.testing.assert_close(found["logits"], logits)


def test_tinymims_star_has_a_second_token_and_a_further_layer(tmp_path: Path) -> None:
    """Against the bias of each pair of tokens, and torch's layers."""
    dim, side = 16, 2
    trunk: Any = randomize(
        DistilledBeit(
            img_size=8 * side, patch_size=8, embed_dim=dim, depth=12, num_heads=2, num_classes=0,
            init_values=0.1, use_abs_pos_emb=True, use_rel_pos_bias=True, global_pool="avg",
        )
    )  # fmt: skip
    tokens = [None, None, *((row, column) for row in range(side) for column in range(side))]
    pairs = (2 * side - 1) ** 2
    layer = trunk.blocks[0].attn
    found = layer._get_rel_pos_bias()[0]
    for i, one in enumerate(tokens):
        for j, other in enumerate(tokens):
            if 0 in (i, j):
                row = pairs + (5 if i == j else 3 if i == 0 else 4)
            elif 1 in (i, j):
                row = pairs + (2 if i == j else 0 if i == 1 else 1)
            else:
                assert one is not None
                assert other is not None
                row = (one[0] - other[0] + side - 1) * (2 * side - 1) + one[1] - other[1] + side - 1
            assert torch.equal(found[:, i, j], layer.relative_position_bias_table[row]), (i, j)
    levels: Any = randomize(TinyMimNeck(dim, 20))
    head = {"conv_seg.weight": torch.randn(3, 4 * dim, 1, 1), "conv_seg.bias": torch.randn(3)}
    state = {k: v for k, v in trunk.state_dict().items() if not k.startswith("fc_norm")}
    state |= levels.state_dict()
    content = {f"backbone.{key}": value for key, value in state.items()}
    content |= {f"decode_head.{key}": value for key, value in head.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": content}, path)
    tables: dict[str, Any] = {
        "backbone": {"type": "MAE", "img_size": 8 * side, "out_indices": [3, 5, 7, 11]},
        "decode_head": {"type": "FCNHead", "in_index": 3, "num_convs": 0},
        "test_cfg": {"mode": "whole"},
    }
    pixels = torch.randn(2, 3, 8 * side, 8 * side)
    logits = load_checkpoint(path, tables).run(pixels)["mask_logits_lowres"]
    with torch.no_grad():
        blocks = trunk.encode(*trunk.embed(pixels))
        maps = [blocks[n][:, 2:].transpose(1, 2).unflatten(2, (side, side)) for n in (3, 5, 7, 11)]
        expected = conv2d(levels(maps)[3], head["conv_seg.weight"], head["conv_seg.bias"])
    torch.testing.assert_close(logits, expected)
    tables["backbone"]["out_indices"] = [3, 5, 7, 10]
    with pytest.raises(CheckpointError, match="out_indices end with 10"):
        load_checkpoint(path, tables)


def test_beits_positions_are_of_any_size_and_relative_ones_of_one() -> None:
    model, _, _ = fixture("beit_abspos_hires")
    assert model.run(torch.randn(1, 3, 50, 90))["tokens"].shape[1] == 1 + 3 * 5
    network = Beit(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3,
                   use_abs_pos_emb=False, use_rel_pos_bias=True)  # fmt: skip
    assert "32x32 pixels alone" in str(network.check_size(32, 40))
    assert network.check_size(32, 32) is None


# -- decoders ----------------------------------------------------------------------------------


def test_segmenters_decoder_has_two_sets_of_names() -> None:
    decoder = randomize(MaskTransformer(20, 24, 5, depth=2, heads=3, mlp_ratio=4, norm_eps=1e-5))
    theirs = {}
    renamed = (
        ("blocks.", "layers."), ("norm1", "ln1"), ("norm2", "ln2"), ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"), ("attn.qkv.", "attn.attn.in_proj_"),
        ("attn.proj.", "attn.attn.out_proj."), ("proj_dec", "dec_proj"),
    )  # fmt: skip
    for key, value in decoder.state_dict().items():
        name = key
        for ours, other in renamed:
            name = name.replace(ours, other)
        if key in ("proj_patch", "proj_classes"):
            name, value = f"{key.removeprefix('proj_')}_proj.weight", value.T
        theirs[f"decode_head.{name}"] = value
    named = in_segmenters_names(theirs)
    assert named.keys() == {f"decode_head.{key}" for key in decoder.state_dict()}
    settings = {"inputs": [20], "num_heads": 3, "norm_eps": 1e-5}
    created = create_decoder(named, settings).eval()
    created.load_state_dict(named)
    maps = [torch.randn(2, 20, 3, 4)]
    with torch.no_grad():
        torch.testing.assert_close(created(maps), decoder(maps))


def test_necks_have_the_activations_of_their_configuration(tmp_path: Path) -> None:
    """The weights of a neck with and without ReLUs are the same."""
    assert model_of(content("seg_upernet_vit_mln"))["model"]["neck"].get("act_cfg") is None
    path = rewritten(
        "seg_upernet_vit_mln",
        lambda config: config["model"]["neck"].update(act_cfg={"type": "ReLU"}),
        tmp_path,
    )
    pixels = torch.randn(1, 3, 64, 64)
    plain, _, _ = fixture("seg_upernet_vit_mln")
    tables = {"neck": {"type": "MultiLevelNeck", "scales": [4, 2, 1, 0.5]}}
    same = load_checkpoint(path, tables).run(pixels)["mask_logits"]
    assert torch.equal(plain.run(pixels)["mask_logits"], same)
    activated = load_checkpoint(path).run(pixels)["mask_logits"]
    assert not torch.allclose(activated, same, atol=1e-3)


@pytest.mark.parametrize("name", ["seg_convnext_mmengine", "seg_upernet_swin_mmseg"])
def test_backbones_have_two_sets_of_names(name: str, tmp_path: Path) -> None:
    """ConvNeXt in mmpretrain's names, and Swin in its authors' names."""
    loaded = content(name)
    names = {
        "seg_convnext_mmengine": [("dwconv", "depthwise_conv"), ("pwconv", "pointwise_conv")],
        "seg_upernet_swin_mmseg": [
            ("stages.", "layers."), ("patch_embed.projection", "patch_embed.proj"),
            ("attn.w_msa", "attn"), ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2"),
        ],
    }[name]  # fmt: skip
    state = {}
    for key, value in loaded["state_dict"].items():
        renamed = key
        if key.startswith("backbone."):
            for theirs, other in names:
                renamed = renamed.replace(theirs, other)
        state[renamed] = _unfolded(value) if "swin" in name and ".downsample." in key else value
    torch.save({**loaded, "state_dict": state}, tmp_path / "renamed.pth")
    pixels = torch.randn(1, 3, 70, 90)
    model, _, _ = fixture(name)
    found = load_checkpoint(tmp_path / "renamed.pth").run(pixels)
    torch.testing.assert_close(found["mask_logits"], model.run(pixels)["mask_logits"])


def test_segmenters_settings_are_read_from_beside_the_file(tmp_path: Path) -> None:
    folder = folder_of("segmenter_original_linear")
    file = (folder / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(file)
    settings = yaml.safe_load((folder / "variant.yml").read_text())
    settings["inference_kwargs"] |= {"window_size": 32, "window_stride": 16, "im_size": 48}
    (tmp_path / "variant.yml").write_text(yaml.safe_dump(settings))
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth", {})
    assert checkpoint.assumed.keys() == {"labels"}
    windows = checkpoint.heads["semantic"].settings["windows"]
    assert (windows["crop"], windows["stride"]) == ([32, 32], [16, 16])
    assert min(windows["scale"]) == 48
    (tmp_path / "variant.yml").write_text("{")
    with pytest.raises(CheckpointError, match=r"variant\.yml: not readable as YAML"):
        read_checkpoint(tmp_path / "checkpoint.pth", {})
    (tmp_path / "variant.yml").unlink()
    with pytest.raises(CheckpointError, match="window_size is 50"):
        read_checkpoint(tmp_path / "checkpoint.pth", {"window_size": 50})
    assert "n_heads" in read_checkpoint(tmp_path / "checkpoint.pth", {}).assumed


# -- depth -------------------------------------------------------------------------------------


def dpt_file(folder: Path, dim: int) -> dict[str, torch.Tensor]:
    """A DPT head with random weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "reassemble_blocks.resize_layers.0.weight": (6, 6, 4, 4),
        "reassemble_blocks.resize_layers.0.bias": (6,),
        "reassemble_blocks.resize_layers.1.weight": (12, 12, 2, 2),
        "reassemble_blocks.resize_layers.1.bias": (12,),
        "reassemble_blocks.resize_layers.3.weight": (48, 48, 3, 3),
        "reassemble_blocks.resize_layers.3.bias": (48,),
        "project.conv.weight": (16, 16, 3, 3), "project.conv.bias": (16,),
        "conv_depth.head.0.weight": (8, 16, 3, 3), "conv_depth.head.0.bias": (8,),
        "conv_depth.head.2.weight": (32, 8, 3, 3), "conv_depth.head.2.bias": (32,),
        "conv_depth.head.4.weight": (1, 32, 1, 1), "conv_depth.head.4.bias": (1,),
    }  # fmt: skip
    for number, width in enumerate((6, 12, 24, 48)):
        shapes |= {
            f"reassemble_blocks.projects.{number}.conv.weight": (width, dim, 1, 1),
            f"reassemble_blocks.projects.{number}.conv.bias": (width,),
            f"reassemble_blocks.readout_projects.{number}.0.weight": (dim, 2 * dim),
            f"reassemble_blocks.readout_projects.{number}.0.bias": (dim,),
            f"convs.{number}.conv.weight": (16, width, 3, 3),
            f"fusion_blocks.{number}.project.conv.weight": (16, 16, 1, 1),
            f"fusion_blocks.{number}.project.conv.bias": (16,),
        }
        for unit in ("res_conv_unit1", "res_conv_unit2"):
            if number or unit == "res_conv_unit2":
                for part in ("conv1", "conv2"):
                    key = f"fusion_blocks.{number}.{unit}.{part}.conv.weight"
                    shapes[key] = (16, 16, 3, 3)
    state = {key: torch.randn(shape) * 0.1 for key, shape in shapes.items()}
    named = {f"decode_head.{key}": value for key, value in state.items()}
    torch.save({"meta": {}, "state_dict": named}, folder / "dpt.pth")
    return state


def test_a_dpt_head_reads_four_blocks_and_their_class_tokens(tmp_path: Path) -> None:
    folder = folder_of("dinov2_nyu_linear4")
    (tmp_path / "backbone.pth").write_bytes((folder / "backbone.pth").read_bytes())
    state = dpt_file(tmp_path, 48)
    arguments = {"num_heads": 3, "out_index": [0, 1, 2, 3]}
    with pytest.raises(CheckpointError, match=r"max_depth.*10 of NYU's heads, 80 of KITTI's"):
        load_checkpoint(tmp_path / "dpt.pth", arguments)
    with pytest.raises(CheckpointError, match="out_index"):
        load_checkpoint(tmp_path / "dpt.pth", {"num_heads": 3, "max_depth": 10})
    model = load_checkpoint(tmp_path / "dpt.pth", {**arguments, "max_depth": 10})
    pixels = torch.randn(1, 3, 60, 75)  # padded to 70 x 84 around the centre
    found = model.run(pixels)["depth"]
    assert found.shape == (1, 1, 60, 75)
    decoder = create_depth_decoder(state, {"minimum": 0.001, "maximum": 10}).eval()
    decoder.load_state_dict(state)
    whole = nn.functional.pad(pixels, (4, 5, 5, 5))
    trunk = model.trunk.network
    with torch.no_grad():
        levels = trunk.get_intermediate_layers(
            whole, n=[0, 1, 2, 3], reshape=True, return_prefix_tokens=True, norm=False
        )
        expected = decoder([with_class_token(maps, tokens[:, 0]) for maps, tokens in levels])
        expected = nn.functional.interpolate(expected, size=(60, 75), mode="bilinear")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_a_linear_depth_head_assumes_is_listed() -> None:
    path = folder_of("dinov2_nyu_linear4") / "checkpoint.pth"
    given = {"num_heads": 3, "out_index": [0, 1, 2, 3], "img_size": 84}
    assumed = read_checkpoint(path, given).assumed
    assert assumed["max_depth"] == 80
    assert assumed["min_depth"] == 0.001
    assert assumed["upsample"] == 4
    head = load_checkpoint(path, given).heads["depth"]
    assert isinstance(head, Depth)
    with pytest.raises(CheckpointError, match="the head reads 4 of 4 blocks"):
        read_checkpoint(path, {**given, "out_index": [3]})


def test_depths_begin_at_0_or_above() -> None:
    path = folder_of("dinov2_nyu_linear4") / "checkpoint.pth"
    given = {"num_heads": 3, "out_index": [0, 1, 2, 3], "img_size": 84}
    checkpoint = read_checkpoint(path, {**given, "min_depth": 0})
    assert checkpoint.heads["depth"].settings["minimum"] == 0
    for wrong in (-0.1, 80, float("nan")):
        with pytest.raises(CheckpointError, match="min_depth is"):
            read_checkpoint(path, {**given, "min_depth": wrong})


def test_dinov2s_segmentation_heads_read_the_last_blocks(tmp_path: Path) -> None:
    """Those of several scales read four; the file's configuration may be missing."""
    folder = folder_of("dinov2_ade20k_linear")
    (tmp_path / "backbone.pth").write_bytes((folder / "backbone.pth").read_bytes())
    state = {
        **{f"decode_head.bn.{name}": torch.rand(192) + 0.5
           for name in ("weight", "bias", "running_mean", "running_var")},
        "decode_head.bn.num_batches_tracked": torch.tensor(1),
        "decode_head.conv_seg.weight": torch.randn(21, 192, 1, 1) * 0.1,
        "decode_head.conv_seg.bias": torch.randn(21),
    }  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "ms.pth")
    arguments = {"num_heads": 3}
    with pytest.raises(CheckpointError, match=r"does not say test_cfg\.mode"):
        read_checkpoint(tmp_path / "ms.pth", arguments)
    test = {"mode": "slide", "crop_size": [56, 56], "stride": [28, 28]}
    resized = {"decode_head": {"type": "BNHead", "resize_factors": [1, 1, 2, 2]}}
    with pytest.raises(CheckpointError, match="resize_factors"):
        read_checkpoint(tmp_path / "ms.pth", {**arguments, **resized, "test_cfg": test})
    checkpoint = read_checkpoint(tmp_path / "ms.pth", {**arguments, "test_cfg": test})
    assert checkpoint.assumed["out_indices"] == [0, 1, 2, 3]
    assert checkpoint.heads["semantic"].settings["in_index"] == [0, 1, 2, 3]
    model = load_checkpoint(tmp_path / "ms.pth", {**arguments, "test_cfg": test})
    pixels = torch.randn(1, 3, 56, 56)
    network = model.trunk.network
    with torch.no_grad():
        tokens = torch.cat(network.get_intermediate_layers(pixels, n=[0, 1, 2, 3], norm=True), -1)
        scale = state["decode_head.bn.weight"] / (state["decode_head.bn.running_var"] + 1e-5).sqrt()
        normed = (tokens - state["decode_head.bn.running_mean"]) * scale
        logits = (normed + state["decode_head.bn.bias"]) @ state["decode_head.conv_seg.weight"][
            :, :, 0, 0
        ].T + state["decode_head.conv_seg.bias"]
    found = model.run(pixels)["mask_logits_lowres"]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), logits, atol=1e-5, rtol=0)


def test_a_backbone_apart_is_needed(tmp_path: Path) -> None:
    folder = folder_of("dinov2_ade20k_linear")
    (tmp_path / "head.pth").write_bytes((folder / "checkpoint.pth").read_bytes())
    hyperparameters = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    with pytest.raises(CheckpointError, match=r"put backbone\.pth or .* beside it"):
        load_checkpoint(tmp_path / "head.pth", hyperparameters)
