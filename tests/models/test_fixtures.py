"""Published layouts against the outputs of the authors' own code, from `shared/goldens`."""

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from models import load_checkpoint
from models.errors import CheckpointError
from models.model import Model
from models.tokenizer import OpenAITokenizer

GOLDENS = Path(__file__).parents[3] / "shared/goldens"
INPUTS = ("pixel_values", "token_ids")
# About the tokenizer of the full vocabulary, which the fixtures' small models do not have.
NOT_THE_MODELS = ("tokenizer_token_ids",)


FIXTURES = (
    "clip", "clip_jit", "dino_linear", "ggem", "irt", "moco_v3_linear", "vqt", "vqt_mae",
    "vqt_wsum",
)  # fmt: skip


def fixture(
    name: str, file: str = "checkpoint.*", **arguments: Any
) -> tuple[Model, dict[str, torch.Tensor], dict[str, Any]]:
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    meta = json.loads((folder / "meta.json").read_text())
    path = next(folder.glob(file))
    model = load_checkpoint(path, arguments=meta["hyperparameters"] | arguments)
    return model, load_file(folder / "golden.safetensors"), meta


@pytest.mark.parametrize("name", FIXTURES)
def test_outputs_are_the_references(name: str) -> None:
    check_outputs(*fixture(name)[:2])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vqt", {}),
        ("vqt", {"backbone": "backbone.npz"}),
        ("vqt_wsum", {"backbone": "backbone.npz"}),
        ("vqt_mae", {}),
    ],
)
def test_a_backbone_may_lie_beside_what_was_trained(name: str, arguments: dict[str, Any]) -> None:
    check_outputs(*fixture(name, "tuned_only.pth", **arguments)[:2])


def check_outputs(model: Model, golden: dict[str, torch.Tensor]) -> None:
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


@pytest.mark.parametrize("name", FIXTURES)
def test_real_photos_are_answered_from_the_file_as_it_is(
    name: str, photos: dict[str, Image.Image]
) -> None:
    """By the file's own input size and preprocessing, which `run` on given pixels does not use."""
    model, _, meta = fixture(name)
    preprocess = model.trunk.preprocess
    side = meta["hyperparameters"].get("img_size") or meta["preprocess"]["size"][0]
    assert preprocess.input_size == (side, side)
    assert preprocess.crop_pct == meta["preprocess"]["crop_pct"]
    assert preprocess.mean == tuple(meta["preprocess"]["mean"])
    assert preprocess.std == tuple(meta["preprocess"]["std"])
    [answer] = model.predict([photos["chelsea"]], task="embed")
    assert np.isfinite(answer["embedding"]).all()


@pytest.mark.parametrize("numpy_name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_training_leftovers_that_run_nothing_are_let_pass(tmp_path: Path, numpy_name: str) -> None:
    """Schedules leave numpy's scalars in optimizers, under numpy 1's and 2's names of them."""
    network = timm.create_model("test_vit")
    path = tmp_path / "training.pth"
    learning_rate = np.float64(0.1)
    content = {
        "model": network.state_dict(),
        "optimizer": {"param_groups": [{"lr": learning_rate, "step": np.int64(3)}]},
        "args": argparse.Namespace(lr=learning_rate),
    }
    torch.save(content, path)
    raw = path.read_bytes()
    swapped = tmp_path / "renamed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(swapped, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
                    data = data.replace(name + b"\n", numpy_name.encode() + b"\n")
            new.writestr(item, data)
    assert b"multiarray" in raw
    model = load_checkpoint(swapped, {"architecture": "test_vit"})
    assert model.task == "classify"


def test_code_in_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", evil)
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"os\.system"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def vqt_file(tmp_path: Path, change: Any) -> Path:
    """The fixture's VQT checkpoint with its head changed."""
    folder = GOLDENS / "vqt"
    if not folder.is_dir():
        pytest.skip("the fixture vqt is not here (shared/goldens)")
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    change(content["model"])
    torch.save(content, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_a_selection_of_features_needs_to_be_told(tmp_path: Path) -> None:
    """Upstream stores the narrower classifier alone; which features it sees is in another file."""
    chosen = [3, 50, 100, 190]

    def select(state: dict[str, torch.Tensor]) -> None:
        state["head.last_layer.weight"] = state["head.last_layer.weight"][:, chosen]

    path = vqt_file(tmp_path, select)
    arguments = json.loads((GOLDENS / "vqt/meta.json").read_text())["hyperparameters"]
    with pytest.raises(CheckpointError, match="takes 4 features of 192; which ones, only indices"):
        load_checkpoint(path, arguments)
    np.save(tmp_path / "chosen.npy", np.array(chosen))
    golden = load_file(GOLDENS / "vqt/golden.safetensors")
    state = torch.load(path, weights_only=True)["model"]
    weight, bias = state["head.last_layer.weight"], state["head.last_layer.bias"]
    wanted = golden["embedding"][:, chosen] @ weight.T + bias
    for indices in (chosen, "chosen.npy"):
        model = load_checkpoint(path, {**arguments, "indices": indices})
        logits = model.run(golden["pixel_values"])["logits"]
        assert torch.allclose(logits, wanted, atol=1e-5)


def test_a_head_of_several_layers_is_read(tmp_path: Path) -> None:
    """MODEL.MLP_NUM above 0: Linear, ReLU, BatchNorm1d and Dropout, then the last layer."""
    torch.manual_seed(0)
    norm: Any = torch.nn.BatchNorm1d(20)
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    first = torch.nn.Linear(192, 20)
    hidden = torch.nn.Sequential(first, torch.nn.ReLU(), norm, torch.nn.Dropout()).eval()
    last = torch.nn.Linear(20, 7)

    def deepen(state: dict[str, torch.Tensor]) -> None:
        state |= {f"head.projection.{key}": value for key, value in hidden.state_dict().items()}
        state |= {f"head.last_layer.{key}": value for key, value in last.state_dict().items()}

    path = vqt_file(tmp_path, deepen)
    arguments = json.loads((GOLDENS / "vqt/meta.json").read_text())["hyperparameters"]
    golden = load_file(GOLDENS / "vqt/golden.safetensors")
    with torch.no_grad():
        wanted = last(hidden(golden["embedding"]))
    logits = load_checkpoint(path, arguments).run(golden["pixel_values"])["logits"]
    assert torch.allclose(logits, wanted, atol=1e-5)


def test_a_missing_backbone_says_what_to_do(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"module.linear.weight": torch.zeros(3, 8),
                        "module.linear.bias": torch.zeros(3)}},
        tmp_path / "linear.pth",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"put backbone\.pth or .* beside it"):
        load_checkpoint(tmp_path / "linear.pth")
