"""The last entries of the catalog `published` at full size, see `published.py`: MViTs of clips, by
SlowFast's configurations and the numbers of parameters of its model zoo, and files that need
another beside them."""

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from models.checkpoints.containers import Container
from models.checkpoints.formats import dino_linear, vqt
from models.networks import create_own
from tests.models.published import (
    State,
    below,
    check,
    from_timm,
    meta,
    on_meta,
    read,
    with_values,
)
from tests.models.test_published_backbones import decoder, in_jax_names

__all__ = ["with_values"]

# -- MViT --------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def mvit(
    *, depth: int, dim: int, heads: int, starts: tuple[int, ...], grid: tuple[int, int],
    kernel: tuple[int, int, int], first: int, second: bool, classes: int,
) -> Shapes:  # fmt: skip
    """The weights of an MViT.

    Args:
        starts: the blocks that double the channels, and halve the map.
        grid: frames and side of the first block's map.
        first: the stride of keys and values in the first block.
        second: of version 2.
    """
    frames, side = grid
    image = kernel[0] == 1
    shapes: Shapes = {"cls_token": (1, 1, dim)} | affine("patch_embed.proj", dim)
    shapes["patch_embed.proj.weight"] = (dim, 3, 7, 7) if image else (dim, 3, 3, 7, 7)
    if not second and image:
        shapes["pos_embed"] = (1, 1 + side**2, dim)
    elif not second:
        shapes |= {"pos_embed_spatial": (1, side**2, dim), "pos_embed_class": (1, 1, dim),
                   "pos_embed_temporal": (1, frames, dim)}  # fmt: skip
    stride = first
    for number in range(depth):
        block, attention = f"blocks.{number}", f"blocks.{number}.attn"
        pools = number in starts
        heads *= 2 if pools else 1
        inner = 2 * dim if second and pools else dim
        widened = 2 * inner if not second and number + 1 in starts else inner
        stride = stride // 2 if pools else stride
        step = 2 if pools else 1
        width = inner // heads
        shapes |= affine(f"{block}.norm1", dim) | affine(f"{block}.norm2", inner)
        shapes |= linear(f"{attention}.qkv", 3 * inner, dim) | linear(
            f"{attention}.proj", inner, inner
        )
        for part in "qkv" if second or pools else "kv":
            shapes[f"{attention}.pool_{part}.weight"] = (width, 1, *kernel)
            shapes |= affine(f"{attention}.norm_{part}", width)
        if second:
            rows = 2 * max(side // step, side // stride) - 1
            for axis, count in (("h", rows), ("w", rows), ("t", 2 * frames - 1)):
                shapes[f"{attention}.rel_pos_{axis}"] = (count, width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * inner, inner)
        shapes |= linear(f"{block}.mlp.fc2", widened, 4 * inner)
        if dim != widened:
            shapes |= linear(f"{block}.proj", widened, dim)
        dim, side = widened, side // step
    return shapes | affine("norm", dim) | linear("head.projection", classes, dim)


CLIPS = {"DIM_MUL_IN_ATT": True, "RESIDUAL_POOLING": True}
# By entry: the configuration, what else tells the weights, and millions of parameters, not compared
# of the large one.
MVITS: dict[str, tuple[dict[str, Any], dict[str, Any], float | None]] = {
    "mvitv2-s-16x4-k400": ({"DEPTH": 16, "EMBED_DIM": 96, "NUM_HEADS": 1},
                           {"starts": (1, 3, 14), "frames": 16, "rate": 4, "side": 224}, 34.5),
    "mvitv2-b-32x3-k400": ({"DEPTH": 24, "EMBED_DIM": 96, "NUM_HEADS": 1},
                           {"starts": (2, 5, 21), "frames": 32, "rate": 3, "side": 224}, 51.2),
    "mvitv2-l-40x3-k400": ({"DEPTH": 48, "EMBED_DIM": 144, "NUM_HEADS": 2},
                           {"starts": (2, 8, 44), "frames": 40, "rate": 3, "side": 312}, None),
    "mvit-b-32x3-k400": ({"DEPTH": 16, "EMBED_DIM": 96, "NUM_HEADS": 1},
                         {"starts": (1, 3, 14), "frames": 32, "rate": 3, "side": 224}, 36.6),
    "mvit-b16-conv-in1k": ({"DEPTH": 16, "EMBED_DIM": 96, "NUM_HEADS": 1},
                           {"starts": (1, 3, 14), "frames": 1, "rate": 1, "side": 224}, 37.0),
}  # fmt: skip


@pytest.mark.parametrize("entry", MVITS)
def test_mvit(entry: str) -> None:
    table, other, millions = MVITS[entry]
    second, image = "v2" in entry, other["frames"] == 1
    kernel, first = ((1, 3, 3), 4) if image else ((3, 3, 3), 8)
    starts, side = other["starts"], other["side"]
    shapes = mvit(
        depth=table["DEPTH"], dim=table["EMBED_DIM"], heads=table["NUM_HEADS"], starts=starts,
        grid=(max(1, other["frames"] // 2), side // 4), kernel=kernel, first=first, second=second,
        classes=1000 if image else 400,
    )  # fmt: skip
    if millions is not None:
        assert round(sum(prod(shape) for shape in shapes.values()) / 1e6, 1) == millions
    blocks = range(table["DEPTH"]) if second else starts
    config = table | {
        "MODE": "conv", "CLS_EMBED_ON": True, "DIM_MUL": [[n, 2.0] for n in starts],
        "HEAD_MUL": [[n, 2.0] for n in starts], "POOL_KVQ_KERNEL": list(kernel),
        "POOL_KV_STRIDE_ADAPTIVE": [1, first, first],
        "POOL_Q_STRIDE": [[n, 1, 2, 2] if n in starts else [n, 1, 1, 1] for n in blocks],
        "PATCH_KERNEL": [7, 7] if image else [3, 7, 7],
        "PATCH_STRIDE": [4, 4] if image else [2, 4, 4],
        "PATCH_PADDING": [3, 3] if image else [1, 3, 3],
        "SEP_POS_EMBED": not (second or image), **(CLIPS if second else {}),
    }  # fmt: skip
    data = {"TRAIN_CROP_SIZE": side, "NUM_FRAMES": other["frames"], "SAMPLING_RATE": other["rate"]}
    text = repr({"MVIT": config, "DATA": data})
    state = {key: torch.zeros(shape, device="meta") for key, shape in shapes.items()}
    checkpoint = read(entry, state, "model_state", beside={"cfg": text})
    assert checkpoint.format == "mvit"
    check(checkpoint, num_classes=1000 if image else 400, input_size=(side, side))
    counts = [block["num_heads"] for block in checkpoint.arguments["blocks"]]
    assert (counts[0], counts[-1]) == (table["NUM_HEADS"], 8 * table["NUM_HEADS"])
    if not image:
        preprocess: Any = checkpoint.preprocess
        assert (preprocess.frames, preprocess.sampling_rate) == (other["frames"], other["rate"])


# -- two towers, and a generator ---------------------------------------------------------------

# By entry: pixels of a patch, strides of the stem, of the branch, and kernels of its adapters.
MS_CLIPS = {
    "msclip-b32-yfcc": (32, [2, 2, 2, 2], [2, 2, 2, 2, 2], [16, 8, 4, 2, 1]),
    "msclip-b16-yfcc": (16, [2, 2, 2, 1], [2, 2, 2, 2, 1], [8, 4, 2, 1, 1]),
    "msclip-b32-laion": (32, [2, 2, 2, 2], [2, 2, 2, 2, 2], [16, 8, 4, 2, 1]),
}


@pytest.mark.parametrize("entry", MS_CLIPS)
def test_ms_clip(entry: str) -> None:
    """By the configurations of its repository."""
    patch, stem, strides, kernels = MS_CLIPS[entry]
    channels = [48, 96, 192, 384, 768]
    expected = {
        "img_size": 224, "patch_size": patch, "width": 768, "heads": 12, "hidden": 3072,
        "layers": 12, "projected": 512, "stem_strides": stem, "channels": channels,
        "bottlenecks": channels[:-1], "strides": strides, "kernels": kernels,
        "kernel_strides": kernels, "lateral": [2, 4, 6, 8, 10],
    }  # fmt: skip
    state = below("visual.", on_meta(lambda: create_own("ms-clip-image", **expected)))
    text = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
    state |= on_meta(
        lambda: open_clip.transformer.TextTransformer(**text, output_dim=512)
    ) | meta(logit_scale=())  # fmt: skip
    checkpoint = read(f"{entry}-image", state)
    assert checkpoint.format == "ms-clip"
    found = checkpoint.arguments["image"]
    for name, value in expected.items():
        stated = found[name]
        assert (list(stated) if isinstance(stated, list | tuple) else stated) == value, name
    assert {key: checkpoint.arguments["text"][key] for key in text} == text
    towers = (
        ("image", found),
        ("text", {"architecture": "clip-text", **checkpoint.arguments["text"]}),
    )
    for tower, arguments in towers:
        own = below(f"{tower}.", on_meta(partial(create_own, **arguments)))
        kept = {k: v.shape for k, v in checkpoint.state_dict.items() if k.startswith(f"{tower}.")}
        assert kept == {key: value.shape for key, value in own.items()}


def test_vitgan() -> None:
    """For images of 32 pixels: four blocks of six heads, and four convolutions."""
    dim = 384
    shapes: Shapes = {"lff.ffm.conv.weight": (dim, 2, 1, 1), "lff.ffm.conv.bias": (dim,)}
    for number in range(1, 9):
        shapes |= linear(f"style.{number}", dim, dim)
    norms = ["layernorm", *(f"layers.{n}.layernorm{m}" for n in range(4) for m in (1, 2))]
    for norm in norms:
        shapes |= linear(f"{norm}.mlp_gamma", dim, dim) | linear(f"{norm}.mlp_beta", dim, dim)
    for number in range(4):
        shapes[f"layers.{number}.attn.temperature"] = (1,)
        for layer, outputs, inputs in (
            ("attn.to_qkv", 3 * dim, dim), ("attn.to_out.0", dim, dim),
            ("ff.net.0", 4 * dim, dim), ("ff.net.3", dim, 4 * dim),
        ):  # fmt: skip
            name = f"layers.{number}.{layer}.module."
            shapes |= {f"{name}bias": (outputs,), f"{name}weight_u": (outputs,),
                       f"{name}weight_v": (outputs,),
                       f"{name}weight_bar": (outputs, inputs)}  # fmt: skip
        conv = f"convs.{number}"
        shapes |= linear(f"{conv}.conv.modulation", dim, dim) | {
            f"{conv}.conv.weight": (1, dim, dim, 3, 3), f"{conv}.noise.weight": (1,),
            f"{conv}.activate.bias": (dim,),
        }  # fmt: skip
        if number % 2 == 0:
            shapes[f"{conv}.conv.blur.kernel"] = (4, 4)
    shapes |= linear("to_rgb.conv.modulation", dim, dim)
    shapes |= {"to_rgb.conv.weight": (1, 3, dim, 1, 1), "to_rgb.bias": (1, 3, 1, 1)}
    checkpoint = read("vitgan", {key: torch.ones(shape) for key, shape in shapes.items()})
    assert checkpoint.format == "vitgan"
    check(checkpoint, dim=dim, depth=4, heads=6, hidden=4 * dim, mapping=8, side=8,
          channels=[dim] * 4)  # fmt: skip
    assert checkpoint.assumed.keys() == {"heads", "token_width", "spectral_multipliers"}


# -- files with another beside them ------------------------------------------------------------


def beside(
    monkeypatch: pytest.MonkeyPatch, module: Any, tensors: State, name: str, wrapper: str = ""
) -> None:
    """Make a format find weights without values in a companion file, which cannot store them."""
    container = Container(Path(f"/nowhere/{name}"), tensors, wrapper=wrapper)
    monkeypatch.setattr(module, "open_companion", lambda *_: container)


def test_dinos_linear_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the class tokens of the last four blocks."""
    beside(monkeypatch, dino_linear, from_timm("vit_small_patch16_224", num_classes=0),
           "backbone.pth")  # fmt: skip
    state = meta(linear__weight=(1000, 4 * 384), linear__bias=(1000,))
    checkpoint = read("dino-vits16-linear", state, "state_dict")
    assert checkpoint.format == "dino-linear"
    check(checkpoint, num_heads=6, patch_size=16, input_size=(224, 224), crop_pct=0.875)
    assert checkpoint.heads["linear"].settings["layers"] == [-4, -3, -2, -1]


def test_vqt(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query a block, which a classifier reads together with the class token."""
    backbone: State = {}
    network = from_timm("vit_base_patch16_224", num_classes=0)
    for key, value in network.items():
        backbone |= in_jax_names(key, value, 12)
    beside(monkeypatch, vqt, backbone, "backbone.npz")
    state = meta(head__last_layer__bias=(100,), head__last_layer__weight=(100, 768 * 13))
    state |= meta(enc__transformer__encoder__query_prompt_embeddings=(12, 1, 768))
    checkpoint = read("vqt-vitb16", state)
    assert checkpoint.format == "vqt"
    check(checkpoint, num_heads=12, patch_size=16, input_size=(224, 224), crop_pct=1.0)
    assert checkpoint.heads["vqt"].tensors["queries"].shape == (12, 1, 768)


def test_irt(tmp_path: Path) -> None:
    np.savez(tmp_path / "pca.npz", mean=np.zeros(384), components=np.zeros((256, 384)))
    state = from_timm("vit_small_patch16_224")
    checkpoint = read("irt-deit-s", state, "model", tmp_path / "checkpoint.pth")
    assert checkpoint.format == "irt"
    assert set(checkpoint.dropped) == {"head.weight", "head.bias"}
    assert checkpoint.heads["pca"].tensors["components"].shape == (256, 384)
    assert checkpoint.arguments["num_heads"] == 6


def test_sdmae() -> None:
    """MAE's ViT-B and decoder, between parts of training."""
    state = below("encoder.", from_timm("vit_base_patch16_224", num_classes=0))
    state |= decoder(768, 196, 16)
    state |= meta(locality__0__weight=(384, 768), locality__0__bias=(384,),
                  locality__1__weight=(196, 384), locality__1__bias=(196,),
                  base_ctr__cls_token=(1, 1, 768), predictor__0__weight=(4096, 256))  # fmt: skip
    checkpoint = read("sdmae-vitb", state, "model")
    assert checkpoint.format == "sdmae"
    check(checkpoint, num_heads=12, patch_size=16, input_size=(224, 224), crop_pct=0.875)
    assert checkpoint.heads["decoder"].settings["num_heads"] == 16
    assert set(checkpoint.dropped) == {"base_ctr.cls_token", "predictor.0.weight"}


def test_beit_with_absolute_positions() -> None:
    state = from_timm("beit_base_patch16_224", use_abs_pos_emb=True, use_rel_pos_bias=False,
                      num_classes=0, global_pool="token")  # fmt: skip
    state |= meta(mask_token=(1, 1, 768), lm_head__weight=(8192, 768), lm_head__bias=(8192,))
    checkpoint = read("beit-base-800ep", state, "model")
    assert checkpoint.format == "beit"
    check(checkpoint, num_heads=12, use_abs_pos_emb=True, use_shared_rel_pos_bias=False,
          input_size=(224, 224), mean=(0.485, 0.456, 0.406))  # fmt: skip


def test_supmae() -> None:
    state = from_timm("vit_base_patch16_224", num_classes=0)
    state |= decoder(768, 196, 16)
    state |= meta(cls_head__0__weight=(768, 768), cls_head__1__weight=(768,),
                  cls_head__1__bias=(768,), cls_head__1__running_mean=(768,),
                  cls_head__1__running_var=(768,), cls_head__3__weight=(1000, 768),
                  cls_head__3__bias=(1000,))  # fmt: skip
    checkpoint = read("supmae-vitb", state, "model")
    assert checkpoint.format == "supmae"
    check(checkpoint, num_heads=12, patch_size=16, input_size=(224, 224), crop_pct=0.875)
    assert checkpoint.heads["decoder"].settings["num_heads"] == 16
    assert checkpoint.heads["linear"].tensors["classifier.3.weight"].shape == (1000, 768)
