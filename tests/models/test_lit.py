"""LiT: its tokenizer, older names, and what is not LiT as published."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

from models import load_checkpoint
from models.checkpoints.families.jax import TRUNCATED
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError, InputError
from models.inputs.tokenizers import create_tokenizer
from tests.models.test_fixtures import folder_of


def rewritten(tmp_path: Path, change: Any) -> Path:
    with np.load(folder_of("lit_text_transformer") / "checkpoint.npz") as file:
        content = change({key: file[key] for key in file.files})
    np.savez(tmp_path / "checkpoint.npz", **content)
    return tmp_path / "checkpoint.npz"


def write_tokenizer(folder: Path, eos: int = 1) -> None:
    vocabulary = {"<unk>": 0, "</s>": eos, "a": 2, "cat": 3}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = [AddedToken(name, special=True) for name in ("</s>", *map(str, range(200)))]
    tokenizer.add_special_tokens(added)  # ids beyond the model's words, which no text gets
    tokenizer.save(str(folder / "tokenizer.json"))


def test_texts_need_a_tokenizer_and_token_ids_do_not(tmp_path: Path) -> None:
    folder = folder_of("lit_text_transformer")
    golden = load_file(folder / "golden.safetensors")
    path = Path(shutil.copy(folder / "checkpoint.npz", tmp_path))
    model = load_checkpoint(path)
    with pytest.raises(InputError, match=r"token ids alone.* Put its tokenizer\.json beside"):
        model.embed_texts(["a cat"])
    assert model.text is not None
    assert model.text.blank().shape == (16,)  # so that it can be warmed up and served
    with pytest.raises(InputError, match="15 token ids; this model takes 16"):
        model.run(token_ids=golden["token_ids"][:, :15])
    write_tokenizer(tmp_path)
    model = load_checkpoint(path)
    embedded = model.embed_texts(["a cat 199", "cat " * 20])
    ids = torch.tensor([[2, 3, 0] + [1] * 13, [3] * 15 + [1]])
    expected = model.run(token_ids=ids)["text_embedding"]
    assert np.allclose(embedded, expected, atol=1e-6)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path, dict)
    write_tokenizer(tmp_path, eos=120)
    with pytest.raises(CheckpointError, match="ids up to 120, the model 120 words"):
        load_checkpoint(path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        load_checkpoint(path)


def test_names_of_older_flax_are_read(tmp_path: Path) -> None:
    names = (
        ("LayerNorm_1/", "LayerNorm_2/"),
        ("DotProductAttention_0/", "DotProductAttention_1/"),
        ("MlpBlock_0/", "MlpBlock_3/"),
        ("Encoder_0/", "Encoder_1/"),
    )

    def older(content: dict[str, Any]) -> dict[str, Any]:
        for new, old in names:
            content = {key.replace(new, old): value for key, value in content.items()}
        return content

    golden = load_file(folder_of("lit_text_transformer") / "golden.safetensors")
    outputs = load_checkpoint(rewritten(tmp_path, older)).run(
        golden["pixel_values"], golden["token_ids"]
    )
    assert torch.allclose(outputs["logits_per_image"], golden["logits_per_image"], atol=1e-5)


def test_an_image_tower_may_have_a_head(tmp_path: Path) -> None:
    golden = load_file(folder_of("lit_text_transformer") / "golden.safetensors")
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(48, 48)).astype(np.float32)
    bias = generator.normal(size=48).astype(np.float32)
    head = {"img/head/kernel": kernel, "img/head/bias": bias}
    [plain, headed] = [
        load_checkpoint(rewritten(tmp_path, lambda c, more=more: c | more)) for more in ({}, head)
    ]
    tokens = plain.trunk.forward(golden["pixel_values"]).features[:, 0]
    projected = tokens @ torch.from_numpy(kernel) + torch.from_numpy(bias)
    expected = torch.nn.functional.normalize(projected, dim=-1)
    found = headed.run(golden["pixel_values"])["image_embedding"]
    assert torch.allclose(found, expected, atol=1e-5)


def test_resized_pixels_are_cut_as_its_code_casts_them() -> None:
    path = folder_of("lit_text_transformer") / "checkpoint.npz"
    assert read_checkpoint(path, {}).preprocess == replace(TRUNCATED, input_size=(64, 64))


def test_the_token_that_is_read_is_assumed_or_stated(tmp_path: Path) -> None:
    path = folder_of("lit_text_transformer") / "checkpoint.npz"
    assert read_checkpoint(path, {}).assumed == {"pool_type": "last"}
    ids = load_file(path.with_name("golden.safetensors"))["token_ids"]
    last, first = (load_checkpoint(path, {"pool_type": name}) for name in ("last", "first"))
    found = first.run(token_ids=ids)["text_embedding"]
    assert not torch.allclose(found, last.run(token_ids=ids)["text_embedding"], atol=1e-3)
    with pytest.raises(CheckpointError, match="pool_type is 'map'; set one of last, first"):
        read_checkpoint(path, {"pool_type": "map"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"b": c["t"]}, "left over: b"),
        (lambda c: c | {"txt/MAPHead_0/probe": c["t"]}, "left over: txt/MAPHead_0/probe"),
        (lambda c: c | {"txt/BertEncoder_0/x": c["t"]}, "left over: txt/Embed"),
        (lambda c: {k: v for k, v in c.items() if k != "t"}, "the weight 't' is missing"),
        (lambda c: c | {"txt/head/kernel": c["txt/head/kernel"][:, :40],
                        "txt/head/bias": c["txt/head/bias"][:40]}, "have 40 dimensions"),
    ],
)  # fmt: skip
def test_what_is_not_lit_as_published_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewritten(tmp_path, change))


def flaxformers(network: BertModel, head: torch.nn.Linear, *, axes: bool) -> dict[str, Any]:
    """A BERT under flaxformer's names; with `axes` heads have one of their own."""
    heads = network.config.num_attention_heads
    content: dict[str, Any] = {}
    for key, tensor in network.state_dict().items():
        value = tensor.numpy()
        for theirs, ours in FLAXFORMERS:
            key = re.sub(theirs, ours, key)
        if key.endswith("/weight") and "layer_norm" in key:
            key = key.replace("/weight", "/scale")
        elif key.endswith("/weight") and "embedder" not in key:
            key, value = key.replace("/weight", "/kernel"), value.T
            if axes and re.search("/(query|key|value)/", key):
                value = value.reshape(len(value), heads, -1)
            elif axes and "attention_block/dense_layer" in key:
                value = value.reshape(heads, -1, value.shape[1])
        content[f"txt/BertEncoder_0/{key}"] = value
    kernel, bias = head.weight.detach().numpy().T, head.bias.detach().numpy()
    return content | {"txt/head/kernel": kernel, "txt/head/bias": bias}


FLAXFORMERS = (
    (r"^embeddings\.word_embeddings\.weight", "embedder/embedders_token_ids/embedding"),
    (r"^embeddings\.position_embeddings\.weight", "embedder/embedders_position_ids/embedding"),
    (r"^embeddings\.token_type_embeddings\.weight", "embedder/embedders_segment_ids/embedding"),
    (r"^embeddings\.LayerNorm\.", "layer_norm/"),
    (r"^encoder\.layer\.(\d+)\.", r"encoder_block/layer_sequence/layers_\1/"),
    (r"attention\.self\.(\w+)\.", r"attention_block/attention_layer/\1/"),
    (r"attention\.output\.dense\.", "attention_block/dense_layer/"),
    (r"attention\.output\.LayerNorm\.", "attention_block/layer_norm/"),
    (r"intermediate\.dense\.", "mlp_block/mlp/dense_layer/"),
    (r"output\.dense\.", "mlp_block/dense_layer/"),
    (r"output\.LayerNorm\.", "mlp_block/layer_norm/"),
)


@pytest.mark.parametrize("axes", [False, True])
def test_the_text_tower_may_be_a_bert(axes: bool, tmp_path: Path) -> None:
    """As those of LiT-B16B and LiT-L16L, with flax's approximate GELU."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=36, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=64, max_position_embeddings=20,
                        hidden_act="gelu_new")  # fmt: skip
    network: Any = BertModel(config, add_pooling_layer=False)
    network.eval()
    head = torch.nn.Linear(36, 48)
    for parameter in (*network.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    text = flaxformers(network, head, axes=axes)
    path = rewritten(
        tmp_path, lambda c: {k: v for k, v in c.items() if not k.startswith("txt/")} | text
    )
    with pytest.raises(CheckpointError, match="set text_num_heads"):
        load_checkpoint(path)
    model = load_checkpoint(path, {"text_num_heads": 3})
    ids = torch.tensor([[2, 5, 9, 0, 0], [2, 7, 4, 1, 3]])
    with torch.no_grad():
        hidden = network(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(head(hidden), dim=-1)
    found = model.run(token_ids=ids)["text_embedding"]
    assert torch.allclose(found, expected, atol=1e-5)
    assert read_checkpoint(path, {"text_num_heads": 3}).assumed == {"max_len": 16}
    with pytest.raises(InputError, match=r"BERT's of 50 words"):
        model.embed_texts(["a cat"])


def test_texts_of_a_bert_begin_with_its_class_token(tmp_path: Path) -> None:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "cat": 5}
    tokenizer: Any = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    create = create_tokenizer("leading-cls", 4, folder=str(tmp_path), words=6)
    assert create(["a cat", "cat " * 9, ""]).tolist() == [[1, 4, 5, 0], [1, 5, 5, 5], [1, 0, 0, 0]]
