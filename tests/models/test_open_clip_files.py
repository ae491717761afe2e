"""open_clip's own files: what their keys do not tell comes from a configuration, or is refused."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP, build_model_from_openai_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    M2M100Config,
    M2M100Model,
    MT5Config,
    MT5EncoderModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from models import load_checkpoint
from models.errors import CheckpointError, InputError

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 99, "width": 64, "heads": 2, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
EVA: dict[str, Any] = {
    "image_size": 32,
    "timm_model_name": "eva02_base_patch16_clip_224",
    "timm_pool": "token",
    "timm_proj": None,
    "timm_model_kwargs": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
}
COUSINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quickgelu": {"quick_gelu": True},
    "wide heads": {"vision_cfg": VISION | {"width": 80, "head_width": 80, "mlp_ratio": 4.9}},
    "resnet": {"vision_cfg": RESNET},
    "clipa": {
        "vision_cfg": VISION | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
    },
    "siglip 2's text": {
        "init_logit_bias": -10.0,
        "custom_text": True,
        "text_cfg": TEXT
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
    },
    "coca": {
        "vision_cfg": VISION | {"attentional_pool": True, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"layers": 1},
    },
    "layer scale, options": {
        "vision_cfg": VISION | {"ls_init_value": 0.1, "qk_norm": True},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 98},
    },
}


def created(config: dict[str, Any]) -> torch.nn.Module:
    """open_clip's own model of a configuration, with seeded weights in every parameter."""
    torch.manual_seed(0)
    kind: Any = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    network: torch.nn.Module = (CoCa if "multimodal_cfg" in config else kind)(**config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 98, (3, 12))
    ids[:, -2], ids[:, -1] = 98, 0
    return torch.randn(2, 3, side, side), ids


@torch.inference_mode()
def check(path: Path, arguments: dict[str, Any], network: Any, side: int = 32) -> None:
    pixels, ids = inputs(side)
    outputs = load_checkpoint(path, arguments).run(pixel_values=pixels, token_ids=ids)
    for name, expected in (
        ("image_embedding", network.encode_image(pixels, normalize=False)),
        ("text_embedding", network.encode_text(ids, normalize=False)),
    ):
        scale = float(expected.abs().max())
        assert torch.allclose(outputs[name], expected, atol=1e-5 * max(1, scale)), name


@pytest.mark.parametrize("name", COUSINS)
def test_the_configuration_decides(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    config |= COUSINS[name]
    network = created(dict(config))
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, path)
    side = config["vision_cfg"]["image_size"]
    check(path, config, network, side)
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        load_checkpoint(path)
    stored = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stored))
    check(path, {}, network, side)


def test_timm_towers_take_sizes(tmp_path: Path) -> None:
    config = {"embed_dim": 24, "vision_cfg": EVA, "text_cfg": TEXT}
    kwargs = dict(EVA["timm_model_kwargs"])
    network = created({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT})
    tower = open_clip.timm_model.timm.create_model(
        EVA["timm_model_name"], num_classes=24, global_pool="token", **kwargs
    ).eval()
    state = {key: v for key, v in network.state_dict().items() if not key.startswith("visual.")}
    state |= {f"visual.trunk.{key}": value for key, value in tower.state_dict().items()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    network.visual = tower
    check(tmp_path / "open_clip_pytorch_model.bin", config, network)


@pytest.mark.parametrize(
    ("name", "config", "pooler"),
    [
        (
            "google/mt5-base",
            MT5Config(vocab_size=99, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
            "mean_pooler",
        ),
        (
            "facebook/nllb-200-distilled-600M",
            M2M100Config(vocab_size=99, d_model=48, encoder_layers=2, encoder_ffn_dim=64,
                         encoder_attention_heads=4),
            "cls_pooler",
        ),
    ],
)  # fmt: skip
def test_texts_may_have_the_encoder_of_a_translator(
    name: str, config: Any, pooler: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = HFTextEncoder(name, 24, config=BertConfig(**sizes), pooler_type=pooler,
                         proj_type="linear")  # fmt: skip
    whole: Any = {"mt5": MT5EncoderModel, "m2m_100": M2M100Model}[config.model_type]
    text.transformer, text.config = whole(config).encoder, config
    network: Any = created({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT,
                            "custom_text": True})  # fmt: skip
    for parameter in text.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.text = text.eval()
    torch.save(network.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    arguments: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": name, "hf_tokenizer_name": name, "hf_pooler_type": pooler},
    }
    path = tmp_path / "open_clip_pytorch_model.bin"
    if "nllb" in name:
        with pytest.raises(CheckpointError, match="num_attention_heads"):
            load_checkpoint(path, arguments)
        arguments["text_cfg"]["hf_model_kwargs"] = {"num_attention_heads": 4}
    check(path, arguments, network)
    with pytest.raises(InputError, match="token ids alone"):
        load_checkpoint(path, arguments).embed_texts(["a cat"])


@pytest.mark.parametrize(
    ("name", "pooler", "proj"),
    [
        ("roberta-base", "mean_pooler", "mlp"),
        ("xlm-roberta-base", "mean_pooler", "linear"),
        ("microsoft/BiomedNLP-BiomedBERT-base", "cls_last_hidden_state_pooler", "mlp"),
        ("bert-base-uncased", "cls_pooler", "linear"),
        ("bert-base-uncased", "mean_pooler", "linear"),
    ],
)
def test_texts_may_have_a_bert(name: str, pooler: str, proj: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96,
             "max_position_embeddings": 20, "num_attention_heads": 3}  # fmt: skip
    roberta = "roberta" in name
    kind: Any = RobertaConfig if roberta else BertConfig
    options = {"layer_norm_eps": 1e-5, "type_vocab_size": 1} if roberta else {}
    text = HFTextEncoder(
        name, 24, config=kind(**sizes, **options), pooler_type=pooler, proj_type=proj
    )
    network: Any = created({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT,
                            "custom_text": True})  # fmt: skip
    for parameter in text.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.text = text.eval()
    state = network.state_dict()
    if pooler != "cls_pooler":  # `from_config` makes one that open_clip's files do not have
        state = {key: value for key, value in state.items() if ".pooler." not in key}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": name, "hf_tokenizer_name": name},
    }
    if pooler != "mean_pooler":  # which open_clip has where none is stated
        config["text_cfg"]["hf_pooler_type"] = pooler
    with pytest.raises(CheckpointError, match=r"num_attention_heads"):
        load_checkpoint(tmp_path / "open_clip_pytorch_model.bin", config)
    config["text_cfg"]["hf_model_kwargs"] = {"num_attention_heads": 3}
    check(tmp_path / "open_clip_pytorch_model.bin", config, network)


def test_a_tokenizer_of_the_hub_lies_beside_the_file_or_texts_are_refused(tmp_path: Path) -> None:
    network = created({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT})
    config = {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"},
    }
    path = tmp_path / "open_clip_model.bin"
    torch.save(network.state_dict(), path)
    model = load_checkpoint(path, config)
    with pytest.raises(InputError, match=r"token ids alone: its tokenizer, timm/ViT-B-16-SigLIP"):
        model.embed_texts(["a cat"])
    words = {"[PAD]": 0, "a": 1, "cat": 2, "[UNK]": 3}
    plain: Any = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    create: Any = PreTrainedTokenizerFast
    tokenizer = create(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path)
    found = load_checkpoint(path, config).embed_texts(["a cat"])[0]
    ids = torch.tensor([[1, 2] + [0] * 10])
    with torch.inference_mode():
        expected = network.encode_text(ids, normalize=True)[0]  # type: ignore[operator]
    assert torch.allclose(torch.as_tensor(found), expected, atol=1e-5)


def test_a_layout_shared_with_openai_needs_evidence(tmp_path: Path) -> None:
    network = created({"embed_dim": 512, "vision_cfg": VISION | {"width": 768, "layers": 1,
                       "patch_size": 32, "image_size": 224}, "text_cfg": TEXT})  # fmt: skip
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"nothing in the file tells .* activation"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"set transformer_heads, such as"):
        load_checkpoint(path, {"activation": "gelu"})
    with pytest.raises(CheckpointError, match=r"activation is 'relu'; it is quick_gelu or gelu"):
        load_checkpoint(path, {"activation": "relu"})
    check(path, {"activation": "gelu", "transformer_heads": 2}, network, 224)


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_openais_files_are_known_by_their_settings(vision: dict[str, Any], tmp_path: Path) -> None:
    """Also beside a configuration, which is of another file."""
    text = TEXT | {"heads": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    state = created(dict(config)).state_dict()
    expected: Any = build_model_from_openai_state_dict(dict(state)).float()
    expected.load_state_dict(state)
    beside = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    torch.save(state | beside, tmp_path / "ViT-B-32.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    check(tmp_path / "ViT-B-32.pt", {}, expected.eval(), vision["image_size"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": VISION | {"swish": True}}, "vision_cfg has options .* swish"),
        ({"embed_dim": None}, "no embed_dim"),
        ({"text_cfg": None}, "no text_cfg"),
        ({"vision_cfg": VISION | {"layers": 3}}, "missing: transformer"),
        ({"vision_cfg": VISION | {"head_width": 20}}, "cannot be built"),
        ({"preprocess_cfg": {"resize_mode": "stretch"}}, "resize_mode is 'stretch'"),
        ({"text_cfg": {"hf_model_name": "gpt2"}}, "text towers of gpt2 are not supported"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    torch.save(created(dict(config)).state_dict(), tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.bin", config | change)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 12), 99), "token ids are 0 to 98; these are 99 to 99"),
        (torch.full((1, 12), -1), "these are -1 to -1"),
        (torch.ones(1, 13, dtype=torch.long), "13 token ids; the limit is 12"),
        (torch.ones(12, dtype=torch.long), r"token ids are whole numbers \(N, T\)"),
        (torch.ones(1, 12), "not torch.float32"),
    ],
)
def test_token_ids_that_do_not_fit_are_refused(
    ids: torch.Tensor, message: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    path = tmp_path / "model.pt"
    torch.save(created(dict(config)).state_dict(), path)
    with pytest.raises(InputError, match=message):
        load_checkpoint(path, config).run(token_ids=ids)
