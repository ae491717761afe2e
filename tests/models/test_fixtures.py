"""Published layouts against the outputs of the authors' own code, from `shared/goldens`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import load_checkpoint
from models.model import Model
from models.tokenizer import OpenAITokenizer

GOLDENS = Path(__file__).parents[3] / "shared/goldens"
INPUTS = ("pixel_values", "token_ids")
# About the tokenizer of the full vocabulary, which the fixtures' small models do not have.
NOT_THE_MODELS = ("tokenizer_token_ids",)


def fixture(name: str) -> tuple[Model, dict[str, torch.Tensor], dict[str, Any]]:
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    meta = json.loads((folder / "meta.json").read_text())
    path = next(folder.glob("checkpoint.*"))
    model = load_checkpoint(path, arguments=meta["hyperparameters"])
    return model, load_file(folder / "golden.safetensors"), meta


@pytest.mark.parametrize("name", ["clip", "clip_jit", "ggem", "irt"])
def test_outputs_are_the_references(name: str) -> None:
    model, golden, _ = fixture(name)
    given = {key: golden[key] for key in INPUTS if key in golden}
    outputs = model.run(**given)
    wanted = golden.keys() - set(INPUTS) - set(NOT_THE_MODELS)
    assert wanted <= outputs.keys()
    for key in wanted:
        assert outputs[key].shape == golden[key].shape, key
        assert torch.allclose(outputs[key], golden[key].float(), atol=1e-5, rtol=0), key


def test_the_tokenizer_is_openais() -> None:
    path = GOLDENS / "clip/tokenizer_cases.json"
    if not path.is_file():
        pytest.skip("the fixture clip is not here (shared/goldens)")
    cases = json.loads(path.read_text())["cases"]
    ids = OpenAITokenizer(77)([case["text"] for case in cases])
    assert ids.tolist() == [case["token_ids"] for case in cases]


def test_ggem_is_a_pooling_that_can_be_asked_for() -> None:
    model, golden, _ = fixture("ggem")
    head = model.head("embed", {"pooling": "ggem"})
    [row] = model.forward(golden["pixel_values"][:1], head, {"pooling": "ggem"})
    assert np.allclose(row["embedding"], golden["pool_ggem"][0], atol=1e-5)


def test_the_served_descriptor_is_reduced_by_the_pca() -> None:
    model, golden, meta = fixture("irt")
    [row] = model.forward(golden["pixel_values"][:1], model.heads["embed"], {})
    served = model.heads["embed"].finish(row, (64, 64))["embedding"]
    assert served.shape == (meta["hyperparameters"]["pca_dim"],)
    assert np.allclose(served, golden["embedding_pca"][0], atol=1e-5)
