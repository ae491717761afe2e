"""LiT: its tokenizer, older names, and what is not LiT as published."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from models import load_checkpoint
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError, InputError
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
        (lambda c: c | {"txt/BertEncoder_0/x": c["t"]}, "text tower is a BERT"),
        (lambda c: {k: v for k, v in c.items() if k != "t"}, "the weight 't' is missing"),
        (lambda c: c | {"txt/head/kernel": c["txt/head/kernel"][:, :40],
                        "txt/head/bias": c["txt/head/bias"][:40]}, "have 40 dimensions"),
    ],
)  # fmt: skip
def test_what_is_not_lit_as_published_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewritten(tmp_path, change))
