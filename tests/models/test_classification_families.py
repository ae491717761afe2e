"""Cousins of the fixtures with shapes of their own, against timm's networks: the files that the
authors of DINOv2, DeiT, CaiT, ConvNeXt, XCiT, DINO, MoCo v3 and EsViT publish beside those."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.pit import PoolingVisionTransformer
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn

from models import load_checkpoint
from models.checkpoints.checkpoint import HeadState, save_checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.small_scale import DATASETS, small_scale_checkpoint
from models.checkpoints.formats import detect_format
from models.checkpoints.loading import read_checkpoint
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError, InputError
from models.networks.cvt import Cvt, WindowAttention
from models.networks.dhvt import Dhvt
from models.networks.swin import Swin


def randomised(network: Any, seed: int = 0) -> Any:
    """The network in eval mode, with every weight and statistic random."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            state[key] = value
        elif key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator) + 0.5
        else:
            state[key] = torch.randn(value.shape, generator=generator) * 0.1
    network.load_state_dict(state)
    return network.eval()


def pixels(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def dinov2_vit(registers: int, gated: bool, img_size: int = 56) -> Any:
    options: dict[str, Any] = {}
    if gated:  # as timm builds vit_giant_patch14_dinov2
        options = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    return randomised(
        VisionTransformer(
            img_size=img_size, patch_size=14, embed_dim=48, depth=5, num_heads=6, num_classes=0,
            init_values=1.0, reg_tokens=registers, no_embed_class=True, mlp_ratio=4, **options,
        )
    )  # fmt: skip


def in_dinov2s_names(network: Any, chunks: int = 0) -> dict[str, Tensor]:
    """timm's weights as upstream saves them, the position table with a row for the class token."""
    row = torch.zeros(1, 1, network.embed_dim)
    state = {"mask_token": torch.zeros(1, network.embed_dim)}
    for key, value in network.state_dict().items():
        if key == "pos_embed":
            value = torch.cat([row, value], 1)
        key = key.replace("reg_token", "register_tokens")
        if chunks and key.startswith("blocks."):
            number = int(key.split(".")[1])
            key = key.replace("blocks.", f"blocks.{number // chunks}.", 1)
        state[key] = value
    return state


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_with_registers_and_swiglu(tmp_path: Path, registers: int, gated: bool) -> None:
    network = dinov2_vit(registers, gated)
    state = in_dinov2s_names(network)
    if gated:
        renamed = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
        for ours, theirs in renamed.items():
            state = {key.replace(ours, theirs): value for key, value in state.items()}
    model = load_checkpoint(saved(tmp_path / "giant.pth", state), {"num_heads": 6})
    given = pixels(56, 56)
    found = model.run(given)["tokens"]
    assert torch.allclose(found, network.forward_features(given), atol=1e-5)
    with pytest.raises(InputError, match=r"64x56 pixels: its sides must be multiples of 14"):
        model.run(pixels(64, 56))
    checkpoint = read_checkpoint(tmp_path / "giant.pth", {"num_heads": 6})
    assert checkpoint.assumed.keys() == {"interpolate_offset", "interpolate_antialias"}


def test_dinov2s_teacher_has_blocks_in_chunks(tmp_path: Path) -> None:
    network = dinov2_vit(0, gated=False)
    chunked = {f"backbone.{k}": v for k, v in in_dinov2s_names(network, chunks=2).items()}
    head = {
        "dino_head.mlp.0.weight": torch.ones(3, 48),
        "ibot_head.mlp.0.weight": torch.ones(3, 48),
    }
    path = saved(tmp_path / "teacher_checkpoint.pth", {"teacher": chunked | head})
    found = load_checkpoint(path, {"num_heads": 6}).run(pixels(56, 56))["tokens"]
    assert torch.allclose(found, network.forward_features(pixels(56, 56)), atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_linear_classifiers(tmp_path: Path, registers: int) -> None:
    """Of one block, alone and with the backbone, and of the evaluation script."""
    network = dinov2_vit(registers, gated=False)
    backbone = in_dinov2s_names(network)
    saved(tmp_path / "backbone.pth", backbone)
    linear = randomised(nn.Linear(96, 7))
    tokens = network.forward_features(pixels(56, 56))
    features = torch.cat([tokens[:, 0], tokens[:, 1 + registers :].mean(1)], 1)
    whole = {f"backbone.{key}": value for key, value in backbone.items()}
    whole |= {f"linear_head.{key}": value for key, value in linear.state_dict().items()}
    other = {"weight": torch.ones(7, 48), "bias": torch.ones(7)}
    script: dict[str, Tensor] = {}
    for name, state in (("1_blocks_avgpool_True_lr_0_1", linear.state_dict()),
                        ("1_blocks_avgpool_False_lr_0_1", other)):  # fmt: skip
        prefix = f"module.classifiers_dict.classifier_{name}.linear."
        script |= {f"{prefix}{key}": value for key, value in state.items()}
    for name, content in (("alone", linear.state_dict()), ("hub", whole),
                          ("script", {"model": script, "iteration": 9})):  # fmt: skip
        path = saved(tmp_path / f"{name}.pth", content)
        arguments = {"num_heads": 6, "classifier": "classifier_1_blocks_avgpool_True_lr_0_1"}
        found = load_checkpoint(path, arguments).run(pixels(56, 56))["logits"]
        assert torch.allclose(found, linear(features), atol=1e-5), name
    with pytest.raises(CheckpointError, match=r"2 classifiers; set arguments = \{classifier"):
        load_checkpoint(tmp_path / "script.pth", {"num_heads": 6})


def test_deit_distilled(tmp_path: Path) -> None:
    network = randomised(
        timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=48, embed_dim=72, depth=2, num_heads=3,
            num_classes=5,
        )
    )  # fmt: skip
    path = saved(tmp_path / "deit.pth", {"model": network.state_dict()})
    model = load_checkpoint(path, {"num_heads": 3})
    assert torch.allclose(model.run(pixels(48, 48))["logits"], network(pixels(48, 48)), atol=1e-5)
    with pytest.raises(InputError, match=r"64x48 pixels: its positions are for 48x48"):
        model.run(pixels(64, 48))


def test_an_image_is_larger_than_patches(tmp_path: Path) -> None:
    path = saved(tmp_path / "convnext.pth", {"model": convnext(None)[1]})
    with pytest.raises(CheckpointError, match="at least 8 pixels"):
        load_checkpoint(path, {"img_size": [1, 2]})


def test_deits_training_checkpoint(tmp_path: Path) -> None:
    """With the script's arguments, which also say how it evaluates."""
    network = randomised(timm.create_model("deit_tiny_patch16_224", img_size=48, depth=2))
    content = {
        "model": network.state_dict(), "optimizer": {}, "epoch": 3, "model_ema": {},
        "args": {"distillation_type": "none", "teacher_model": "regnety_160", "finetune": "",
                 "nb_classes": 1000, "eval_crop_ratio": 1.0},
    }  # fmt: skip
    model = load_checkpoint(saved(tmp_path / "checkpoint.pth", content))
    assert torch.allclose(model.run(pixels(48, 48))["logits"], network(pixels(48, 48)), atol=1e-5)


def convnext(scale: float | None) -> tuple[Any, dict[str, Tensor]]:
    network = randomised(
        ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=9, ls_init_value=scale)
    )
    names = {"stem.": "downsample_layers.0.", "head.norm.": "norm.", "head.fc.": "head.",
             "conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}  # fmt: skip
    state = {}
    for key, value in network.state_dict().items():
        parts = key.split(".")
        if "downsample" in key:
            key = f"downsample_layers.{parts[1]}.{'.'.join(parts[3:])}"
        key = key.replace(".blocks.", ".")
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    return network, state


@pytest.mark.parametrize("scale", [None, 1e-6])
def test_convnexts_of_other_sizes(tmp_path: Path, scale: float | None) -> None:
    network, state = convnext(scale)
    path = saved(tmp_path / "convnext.pth", {"model": state})
    found = load_checkpoint(path).run(pixels(70, 64))["logits"]
    assert torch.allclose(found, network(pixels(70, 64)), atol=1e-5)
    assert read_checkpoint(path, {}).assumed == {"img_size": 224}
    assert load_checkpoint(path, {"img_size": 384}).trunk.preprocess.crop_mode == "squash"


def xcit(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    network = randomised(Xcit(patch_size=8, embed_dim=48, depth=2, num_heads=4, eta=1.0, **options))
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        key = key.replace("pos_embed.", "pos_embeder.")
        if "cls_attn" in key and ".attn.q." in key:
            parts = [network.state_dict()[key.replace(".q.", f".{part}.")] for part in "qkv"]
            state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not ("cls_attn" in key and (".attn.k." in key or ".attn.v." in key)):
            state[key] = value
    return network, state


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_xcits_own_files_at_odd_sizes(tmp_path: Path, tokens_norm: bool) -> None:
    network, state = xcit(num_classes=5, tokens_norm=tokens_norm)
    path = saved(tmp_path / "xcit.pth", {"model": state})
    outputs = load_checkpoint(path, {"tokens_norm": tokens_norm}).run(pixels(45, 64))
    assert torch.allclose(outputs["logits"], network(pixels(45, 64)), atol=1e-5)
    assert outputs["feature_map"].shape == (2, 48, 6, 8)
    known = {"tokens_norm": tokens_norm}
    assert read_checkpoint(path, known).assumed.keys() == {"img_size", "crop_pct"}
    with pytest.raises(CheckpointError, match="tokens_norm"):
        read_checkpoint(path, {})


def test_xcits_script_tells_how_it_evaluates(tmp_path: Path) -> None:
    _, state = xcit(num_classes=5, tokens_norm=True)
    known = {"tokens_norm": True}
    for full, ratio in ((True, 1.0), (False, 0.875)):
        args = {"full_crop": full, "input_size": 64}
        path = saved(tmp_path / "xcit.pth", {"model": state, "args": args})
        read = read_checkpoint(path, known).preprocess
        assert read is not None
        assert (read.crop_pct, read.input_size) == (ratio, (64, 64))
    assert read_checkpoint(saved(tmp_path / "flat.pth", state), known).format == "xcit"


def test_convnexts_script_tells_how_it_normalises(tmp_path: Path) -> None:
    state = {"model": convnext(None)[1]}
    args = {"input_size": 64, "crop_pct": 0.95, "imagenet_default_mean_and_std": False}
    read = read_checkpoint(saved(tmp_path / "c.pth", {**state, "args": args}), {}).preprocess
    assert read is not None
    assert (read.input_size, read.crop_pct, read.mean) == ((64, 64), 0.95, (0.5, 0.5, 0.5))


def test_dhvts_script_tells_its_input_size(tmp_path: Path) -> None:
    """Patches of four pixels are those of CIFAR, whose images are not always of 32 pixels."""
    network = Dhvt(patch_size=4, embed_dim=16, depth=1, num_heads=2, hidden=32,
                   qkv_bias=True, num_classes=3)  # fmt: skip
    content = {"model": network.state_dict(), "args": {"input_size": 64}}
    read = read_checkpoint(saved(tmp_path / "dhvt.pth", content), {})
    assert read.preprocess is not None
    assert (read.preprocess.input_size, read.preprocess.crop_pct) == ((64, 64), 0.875)


def test_a_distilled_pit_may_have_no_classifier(tmp_path: Path) -> None:
    network = randomised(
        PoolingVisionTransformer(
            img_size=64, patch_size=16, stride=8, base_dims=(8, 8, 8), depth=(1, 1, 1),
            heads=(2, 4, 8), num_classes=0, distilled=True,
        )
    )  # fmt: skip
    state = {
        re.sub(r"transformers\.(\d)\.pool", lambda m: f"pools.{int(m[1]) - 1}", key): value
        for key, value in network.state_dict().items()
    }
    model = load_checkpoint(saved(tmp_path / "pit.pth", state), {"heads": [2, 4, 8]})
    found, (expected, of_second) = (
        model.run(pixels(64, 64)),
        network.forward_features(pixels(64, 64)).unbind(1),
    )
    assert torch.allclose(found["embedding"], expected, atol=1e-5)
    assert torch.allclose(found["embedding_dist"], of_second, atol=1e-5)
    assert "logits_dist" not in found
    with pytest.raises(InputError, match="80 x 80, but of 64 x 64") as raised:
        model.run(pixels(80, 80))
    assert raised.value.field == "pixel_values"


def test_dinos_linear_classifiers_of_other_backbones(tmp_path: Path) -> None:
    resnet = randomised(ResNet(Bottleneck, (1, 1, 1, 1), channels=(8, 8, 8, 16), num_classes=0))
    transformer, state = xcit(num_classes=0, tokens_norm=True)
    for network, backbone in ((resnet, resnet.state_dict()), (transformer, state)):
        saved(tmp_path / "backbone.pth", backbone)
        features = network(pixels(64, 64))
        linear = randomised(nn.Linear(features.shape[1], 7))
        weights = {f"module.linear.{key}": value for key, value in linear.state_dict().items()}
        path = saved(tmp_path / "linear.pth", {"epoch": 1, "state_dict": weights, "best_acc": 1.0})
        found = load_checkpoint(path, {"tokens_norm": True}).run(pixels(64, 64))["logits"]
        assert torch.allclose(found, linear(features), atol=1e-4)


@pytest.mark.parametrize(("blocks", "way"), [(1, 1), (1, 2), (4, 2), (2, 0), (1, True)])
def test_ibots_linear_classifiers_read_patches_in_their_own_ways(
    blocks: int, way: Any, tmp_path: Path
) -> None:
    """Of many classifiers the best is served; true is DINO's way."""
    network = randomised(
        VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0
        )
    )
    saved(tmp_path / "backbone.pth", {"state_dict": network.state_dict()})
    layers = network.get_intermediate_layers(
        pixels(32, 32), blocks, return_prefix_tokens=True, norm=True
    )
    mean = layers[-1][0].mean(1)
    if way == 1 and way is not True:  # iBOT then builds the network without its final norm
        [mean] = [patches.mean(1) for patches in network.get_intermediate_layers(pixels(32, 32), 1)]
    classes = [token[:, 0] for _, token in layers]
    parts = {0: classes, 1: [mean], 2: [*classes, mean]}
    features = torch.cat(parts[int(way)], 1)
    if way is True:
        features = torch.stack([classes[-1], mean], -1).flatten(1)
    linear = randomised(nn.Linear(features.shape[1], 7))
    weights = {f"{number}.module.linear.{key}": value * number for number in (1, 2)
               for key, value in linear.state_dict().items()}  # fmt: skip
    path = saved(tmp_path / "linear.pth", {"state_dict": weights, "best_acc_hidx": 1})
    with pytest.raises(CheckpointError, match="avgpool_patchtokens"):
        load_checkpoint(path, {"num_heads": 3})
    told = {"num_heads": 3, "n_last_blocks": blocks, "avgpool_patchtokens": way}
    found = load_checkpoint(path, told).run(pixels(32, 32))["logits"]
    assert torch.allclose(found, linear(features), atol=1e-5)
    with pytest.raises(CheckpointError, match="no classifier 3"):
        load_checkpoint(path, told | {"classifier": 3})


@pytest.mark.parametrize(
    ("count", "blocks", "mean"), [(3, 3, None), (3, 2, "appended"), (1, 4, "unnormed")]
)
@pytest.mark.parametrize("by_ibot", [False, True])
def test_a_linear_classifiers_blocks_tell_how_it_reads_patches(
    count: int, blocks: int, mean: str | None, by_ibot: bool, tmp_path: Path
) -> None:
    network = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0
    )
    backbone = network.state_dict()
    saved(tmp_path / "backbone.pth", {"state_dict": backbone} if by_ibot else backbone)
    linear = nn.Linear(24 * count, 7).state_dict()
    weights = {f"module.linear.{key}": value for key, value in linear.items()}
    path = saved(tmp_path / "linear.pth", {"state_dict": weights})
    checkpoint = read_checkpoint(path, {"num_heads": 3, "n_last_blocks": blocks})
    expected = {"layers": list(range(-blocks, 0)), "mean": mean}
    assert checkpoint.heads["linear"].settings == expected
    if by_ibot:
        sizes = [(1, 1), (2, 1)]
        for times, one in sizes:
            weights["module.linear.weight"] = torch.zeros(7, 24 * times)
            saved(path, {"state_dict": weights})
            with pytest.raises(CheckpointError, match="avgpool_patchtokens"):
                read_checkpoint(path, {"num_heads": 3, "n_last_blocks": one})


def test_counters_of_batch_norms_may_be_halved(tmp_path: Path) -> None:
    """Beyond 65504 they are then infinite."""
    network = randomised(timm.create_model("resnet10t", num_classes=5))
    state = {key: value.half() for key, value in network.state_dict().items()}
    for key in state:
        if key.endswith("num_batches_tracked"):
            state[key].fill_(torch.inf)
    path = saved(tmp_path / "resnet.pth", state)
    checkpoint = read_checkpoint(path, {"architecture": "resnet10t"})
    load_strictly(network, checkpoint.state_dict, "resnet10t")
    state["fc.bias"] = torch.ones(5, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"wrong type: fc\.bias"):
        load_strictly(network, state, "resnet10t")


def test_vitrails_own_files_hold_classifiers_without_bias(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    path = saved(tmp_path / "vit.pth", network.state_dict())
    checkpoint = read_checkpoint(path, {"architecture": "vit_tiny_patch16_224"})
    weight = torch.randn(5, network.embed_dim)
    heads = {"linear": HeadState({"classifier.0.weight": weight}, {})}
    save_checkpoint(replace(checkpoint, heads=heads), tmp_path / "vit.safetensors")
    found = read_checkpoint(tmp_path / "vit.safetensors", {})
    assert torch.equal(found.heads["linear"].tensors["classifier.0.weight"], weight)


def test_beits_script_may_have_trained_an_architecture_of_timms(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    script = argparse.Namespace(layer_scale_init_value=0.1)
    path = saved(tmp_path / "vit.pth", {"model": network.state_dict(), "args": script})
    arguments = {"architecture": "vit_tiny_patch16_224"}
    assert read_checkpoint(path, arguments).architecture == "vit_tiny_patch16_224"
    assert read_checkpoint(path, {}).format == "beit-finetuned"


@pytest.mark.parametrize(("pool", "scale"), [("avg", 0.1), ("token", 0.1), ("avg", None)])
def test_beits_script_fine_tunes_vits_of_ibot_and_slip(
    pool: str, scale: float | None, tmp_path: Path
) -> None:
    """Whole biases, and no tables of relative positions. SLIP's small ViT has 12 heads."""
    network = randomised(
        Beit(img_size=32, patch_size=8, embed_dim=384, depth=2, num_heads=12, num_classes=5,
             init_values=scale, use_abs_pos_emb=True, global_pool=pool, mlp_ratio=0.1)
    )  # fmt: skip
    state = network.state_dict()
    for number in range(2):
        name = f"blocks.{number}.attn."
        keys = torch.zeros_like(state[f"{name}q_bias"])
        biases = [state.pop(f"{name}q_bias"), keys, state.pop(f"{name}v_bias")]
        state[f"{name}qkv.bias"] = torch.cat(biases)
    script = {"nb_classes": 5, "finetune": "x.pth", "layer_scale_init_value": scale or 0.0,
              "imagenet_default_mean_and_std": True, "model": "beit_small_patch16_224"}  # fmt: skip
    content = {"model": state, "epoch": 1, "args": argparse.Namespace(**script)}
    model = load_checkpoint(saved(tmp_path / "checkpoint.pth", content))
    assert model.trunk.preprocess.interpolation == "bicubic"
    content["args"].learned_abs_pos_emb = True  # iBOT's copy of the script has it
    model = load_checkpoint(saved(tmp_path / "checkpoint.pth", content))
    assert model.trunk.preprocess.interpolation == "bilinear"
    assert model.trunk.preprocess.mean == (0.485, 0.456, 0.406)
    found = model.run(pixels(32, 32))["logits"]
    assert torch.allclose(found, network(pixels(32, 32)), atol=1e-5)


CVT: dict[str, Any] = {"dims": [8, 16], "depths": [1, 2], "hidden": [16, 32], "heads": [1, 2],
                       "windows": [7, 7], "kernels": [7, 3], "strides": [4, 2],
                       "paddings": [2, 1]}  # fmt: skip


@pytest.mark.parametrize("conv_stem", [False, True])
def test_esvits_linear_classifiers_read_the_means_of_blocks(
    tmp_path: Path, conv_stem: bool
) -> None:
    network = randomised(Cvt(**CVT, conv_stem=conv_stem))
    teacher = {f"module.{key}": value for key, value in network.state_dict().items()}
    teacher |= {"module.head.last_layer.weight_v": torch.ones(3, 16)}
    saved(tmp_path / "backbone.pth", {"student": teacher, "teacher": teacher, "epoch": 1})
    linear = randomised(nn.Linear(8 + 16 + 16, 7))
    weights = {f"module.linear.{key}": value for key, value in linear.state_dict().items()}
    path = saved(tmp_path / "linear.pth", {"state_dict": weights, "epoch": 1, "best_acc": 1.0})
    arguments = {"num_heads": [1, 2], "window_size": 7}
    assert read_checkpoint(tmp_path / "backbone.pth", arguments).assumed["shift"] is False
    for missing in arguments:
        others = {name: value for name, value in arguments.items() if name != missing}
        with pytest.raises(CheckpointError, match=f"does not say {missing}"):
            read_checkpoint(tmp_path / "backbone.pth", others)
    found = load_checkpoint(path, arguments).run(pixels(64, 64))["logits"]
    features = torch.cat(network.block_means(pixels(64, 64)), 1)
    assert torch.allclose(found, linear(features), atol=1e-5)


@pytest.mark.parametrize(("shift", "first"), [(False, 4), (True, 6)])
def test_a_cvts_shift_divides_its_last_windows(shift: bool, first: int) -> None:
    attention = randomised(WindowAttention(8, 2, window=4, bias=True, relative=False, shift=shift))
    x = torch.randn(1, 8, 8, 8)
    changed = x.clone()
    changed[..., 7, 7] += 1
    reached = (attention(x) != attention(changed)).any(1)[0]
    assert reached.nonzero().amin(0).tolist() == [first, first]


def test_a_cvt_whose_windows_are_fixed_says_which_sizes_it_takes(tmp_path: Path) -> None:
    network = randomised(Cvt(**CVT, shift=[True, True]))
    teacher = {f"module.{key}": value for key, value in network.state_dict().items()}
    teacher |= {"module.head.last_layer.weight_v": torch.ones(3, 16)}
    path = saved(tmp_path / "c.pth", {"student": teacher, "teacher": teacher, "epoch": 1})
    stated = {"num_heads": [1, 2], "window_size": 7}
    model = load_checkpoint(path, {**stated, "shift": [True, 1]})
    pooled = network.forward_head(network.forward_features(pixels(64, 56)), pre_logits=True)
    assert torch.equal(model.run(pixels(64, 56))["embedding"], pooled)
    with pytest.raises(InputError, match="stage 1 has 7x6 cells of it, and a window 7x7"):
        model.run(pixels(56, 48))
    with pytest.raises(CheckpointError, match="it needs a value for each of 2"):
        load_checkpoint(path, {**stated, "shift": [True]})


def test_a_swins_last_window_tells_its_input_size(tmp_path: Path) -> None:
    """A window smaller than the others is the whole map of its stage."""
    network = randomised(
        Swin(img_size=96, patch_size=4, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4),
             window_size=6, num_classes=0)
    )  # fmt: skip
    state = {}
    for key, value in network.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        state[key] = value
    path = saved(tmp_path / "swin.pth", {"state_dict": state})
    checkpoint = read_checkpoint(path, {})
    assert checkpoint.arguments["img_size"] == 96
    assert checkpoint.assumed == {}


def small_vit(classes: int, img_size: int = 32) -> Any:
    return randomised(
        VisionTransformer(img_size=img_size, patch_size=img_size // 8, embed_dim=48, depth=2,
                          num_heads=12, mlp_ratio=2, num_classes=classes)
    )  # fmt: skip


def test_small_scale_vits_end_their_fine_tuning_as_flat_files(tmp_path: Path) -> None:
    network = small_vit(200, img_size=64)
    path = saved(tmp_path / "checkpoint.pth", network.state_dict())
    model = load_checkpoint(path, {"num_heads": 12})
    found = model.run(pixels(64, 64))["logits"]
    assert torch.allclose(found, network(pixels(64, 64)), atol=1e-5)
    # the one data set with 200 classes of 64 pixels
    assert model.trunk.preprocess.mean == (0.4802, 0.4481, 0.3975)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "small-scale-vits-finetuned"),
        ({"patch_embed.proj.weight": torch.ones(48, 3, 16, 16), "pos_embed": torch.ones(1, 5, 48)},
         "no known format"),
        ({"patch_embed.proj.weight": torch.ones(48, 4)}, "no known format"),
        ({"patch_embed.proj.weight": None, "patch_embed.proj.12.weight": torch.ones(48, 3, 1, 1)},
         "no known format"),
        ({"blocks.0.mlp.fc1.weight": None}, "no known format"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(96)}, "no known format"),
        ({"extra.weight": torch.ones(1)}, "no known format"),
        ({"ggem.p": torch.ones(1)}, "ggem"),
        ({"blocks.0.attn.q_bias": torch.ones(48)}, "beit-finetuned"),
    ],
)  # fmt: skip
def test_other_flat_vits_are_not_taken_for_small_scale_ones(
    changed: dict[str, Tensor | None], told: str, tmp_path: Path
) -> None:
    state = small_vit(100).state_dict() | changed
    container = Container(tmp_path / "x.pth", {k: v for k, v in state.items() if v is not None})
    if told == "no known format":
        with pytest.raises(CheckpointError, match=told):
            detect_format(container, {})
    else:
        assert told == detect_format(container, {})[0].NAME


def test_a_pca_tells_irts_from_small_scale_vits(tmp_path: Path) -> None:
    container = Container(tmp_path / "x.pth", small_vit(100).state_dict())
    assert detect_format(container, {"pca_dim": 8})[0].NAME == "irt"
    (tmp_path / "pca.npz").touch()
    assert detect_format(container, {})[0].NAME == "irt"


@pytest.mark.parametrize(("dataset", "size"), [("Tiny-Imagenet", 64), ("CIFAR100", 32), (None, 32)])
def test_a_stated_data_set_tells_the_size_of_a_small_scale_swins_images(
    dataset: str | None, size: int
) -> None:
    network = Swin(img_size=64, patch_size=2, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1),
                   window_size=4, num_classes=100)  # fmt: skip
    state = {}
    for key, value in network.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        state[key.replace("head.fc.", "head.")] = value
    preprocess = small_scale_checkpoint("x", state, {"dataset": dataset}).preprocess
    assert preprocess is not None
    assert preprocess.input_size == (size, size)
    assert preprocess.mean == DATASETS[dataset or "CIFAR100"].mean


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (10, "set dataset: one of CIFAR10, SVHN, CINIC"),
        (37, "images of 32 pixels and 37 classes belong to none of CIFAR10, CIFAR100, SVHN, Tiny"),
    ],
)
def test_a_data_set_that_no_shape_tells_is_asked_for(
    classes: int, told: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "checkpoint.pth", small_vit(classes).state_dict())
    with pytest.raises(CheckpointError, match=told):
        read_checkpoint(path, {"num_heads": 12})
    checkpoint = read_checkpoint(path, {"num_heads": 12, "dataset": "SVHN"})
    assert checkpoint.assumed == {}


def test_beit_and_its_second_version_are_told_apart_by_their_statistics(tmp_path: Path) -> None:
    """Both publish base and large classifiers of 224 pixels, with the same keys."""
    network = Beit(img_size=224, embed_dim=768, depth=1, num_heads=12, num_classes=2,
                   init_values=0.1, use_rel_pos_bias=True, mlp_ratio=0.1)  # fmt: skip
    state = network.state_dict()
    path = saved(tmp_path / "checkpoint.pth", {"model": state})
    with pytest.raises(CheckpointError, match=r"false for BEiT of .*, true for .* PeCo"):
        read_checkpoint(path, {})
    stated = read_checkpoint(path, {"imagenet_default_mean_and_std": True})
    assert stated.preprocess is not None
    assert stated.preprocess.mean == (0.485, 0.456, 0.406)
    script = argparse.Namespace(imagenet_default_mean_and_std=False)
    path = saved(tmp_path / "checkpoint.pth", {"model": state, "args": script})
    checkpoint = read_checkpoint(path, {})
    assert checkpoint.preprocess is not None
    assert checkpoint.preprocess.mean == (0.5, 0.5, 0.5)
    assert checkpoint.assumed == {}
