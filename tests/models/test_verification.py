"""`vitrail models verify`: what it compares, and when it fails."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from models import load_checkpoint
from models.errors import EngineError, InputError
from models.trunks.engines.base import Pass
from models.trunks.engines.built import BuiltEngine
from models.trunks.features import PassPlan
from models.verification.comparison import compare_outputs
from models.verification.targets import ServedAs, Target, catalog_target, file_target
from models.verification.verify import read_photos, settle, verify
from service.cli import app
from tests.conftest import encode
from tests.models.test_classification_families import dinov2_vit, in_dinov2s_names, saved
from tests.models.test_fixtures import folder_of

EAGER = ServedAs(device="cpu", engine="eager")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["models", "verify", *arguments])
    return result.exit_code, result.output


def test_a_model_agrees_with_itself_and_with_timm(tiny_catalog: Path) -> None:
    served = ServedAs(device="cpu", engine="openvino")
    target = catalog_target("tiny", str(tiny_catalog), served)
    ours, timms = verify(target.served, target.eager, target.libraries, read_photos(None))
    assert ours.passed
    assert ours.errors.keys() == {"logits", "embedding"}
    assert 0 < ours.errors["logits"] <= 1e-5  # another engine does not give the same bits
    assert timms.passed
    assert timms.errors.keys() == {"logits", "embedding"}
    assert "reads the file itself" in timms.reference


def test_passes_that_are_built_are_built_at_once_not_beside_eager_ones(tiny_catalog: Path) -> None:
    class Threaded(BuiltEngine):
        name = "threaded"
        built_in: tuple[int, ...] = ()

        def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
            self.built_in += (threading.get_ident(),)
            return module

    trunk = catalog_target("tiny", str(tiny_catalog), EAGER).served.trunk
    trunk.engine = engine = Threaded(trunk)
    settle(trunk)
    assert engine.built_in == (threading.get_ident(),)


def test_another_network_in_the_same_place_fails(tiny_catalog: Path) -> None:
    target = catalog_target("conv", str(tiny_catalog), EAGER)
    with torch.no_grad():
        for parameter in target.served.trunk.network.parameters():
            parameter.mul_(1.001)
    comparisons = list(verify(target.served, target.eager, target.libraries, read_photos(None)))
    assert [comparison.passed for comparison in comparisons] == [False, False]
    assert all(comparison.errors["logits"] > 1e-5 for comparison in comparisons)


def test_the_transform_is_part_of_what_is_compared(
    tiny_catalog: Path, photos: dict[str, Image.Image]
) -> None:
    """The fast one decodes large JPEGs at a reduced size."""
    large = [encode(photos["coffee"].resize((2400, 1600)))]
    target = catalog_target("tiny", str(tiny_catalog), replace(EAGER, transform="fast"))
    exact, *_ = verify(target.served, target.eager, (), large, tolerance=1e-5)
    assert not exact.passed
    loose, *_ = verify(target.served, target.eager, (), large)
    assert loose.tolerance is None
    assert loose.passed


def test_a_clip_is_compared_in_both_towers_and_with_open_clip(
    clip: tuple[Path, torch.nn.Module],
) -> None:
    target = file_target(clip[0].parent / "clip.pt", {}, EAGER)
    compared = list(verify(target.served, target.eager, target.libraries, read_photos(None)))
    assert all(comparison.passed for comparison in compared)
    images, texts, library, hub = compared
    assert (images.inputs, texts.inputs) == (8, 4)
    assert "of texts" in texts.reference
    assert library.reference.startswith("open_clip")
    assert library.errors.keys() == {"embedding"}
    assert "CLIPVisionModelWithProjection" in hub.reference


def test_the_command_prints_and_exits_by_the_verdict(tiny_catalog: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    flags = ("--catalog", str(tiny_catalog), "--images", str(tmp_path), "--engine", "openvino")
    status, output = run("tiny", *flags)
    assert (status, output.count("ok  ")) == (0, 2)
    status, output = run("tiny", *flags, "--tolerance", "0", "--json")
    assert status == 1
    described = json.loads(output)
    assert described["engine"] == "openvino"
    assert described["comparisons"][0]["passed"] is False
    assert described["comparisons"][0]["inputs"] == 1


def test_a_checkpoint_file_is_verified_by_its_path(tiny_catalog: Path) -> None:
    path = str(tiny_catalog.parent / "tiny.safetensors")
    status, output = run(path, "--set", "architecture=test_vit", "--engine", "eager")
    assert (status, output.count("ok  ")) == (0, 2)
    status, output = run("nothing-there")
    assert status == 1
    assert "no model 'nothing-there'" in output


def test_photos_of_a_folder(tmp_path: Path, photos: dict[str, Image.Image]) -> None:
    with pytest.raises(InputError, match="has 0 images"):
        read_photos(tmp_path)
    (tmp_path / "a.jpg").write_bytes(encode(photos["coffee"]))
    assert read_photos(tmp_path) == [encode(photos["coffee"])]


def test_values_that_are_not_finite_never_agree() -> None:
    good, bad = [{"logits": np.ones(3)}], [{"logits": np.array([1, np.nan, 1])}]
    with pytest.raises(EngineError, match="not finite"):
        compare_outputs("eager", good, bad, None)
    with pytest.raises(EngineError, match="shape"):
        compare_outputs("eager", good, [{"logits": np.ones(4)}], None)


def test_a_model_of_texts_has_samples_of_its_own(clip: tuple[Path, torch.nn.Module]) -> None:
    target = catalog_target("texts", str(clip[0]), EAGER)
    [texts, *_] = verify(target.served, target.eager, (), read_photos(None))
    assert texts.passed
    assert texts.errors.keys() == {"embedding"}


def test_targets_are_loaded_apart(tiny_catalog: Path) -> None:
    target: Target = catalog_target("tiny", str(tiny_catalog), EAGER)
    assert target.served.trunk is not target.eager.trunk
    path = tiny_catalog.parent / "tiny.safetensors"
    same = load_checkpoint(path, {"architecture": "test_vit"})
    assert same.digest == target.served.digest


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dinov2", "timm .*with the converted weights"),
        ("seg_setr_naive", "timm .*with the converted weights"),
        ("vit_hybrid", "no library has vit: not compared"),
    ],
)
def test_vits_with_options_of_ours_are_timms_where_they_change_nothing(
    name: str, reference: str
) -> None:
    folder = folder_of(name)
    settings = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    [path] = folder.glob("checkpoint.*")
    target = file_target(path, settings, EAGER)
    library, *_ = target.libraries
    assert re.search(reference, library.name)
    photos = read_photos(None)[:1]
    assert all(c.passed or not c.errors for c in
               verify(target.served, target.eager, target.libraries, photos))  # fmt: skip


def test_texts_without_their_tokenizer_are_not_compared() -> None:
    folder = folder_of("open_clip_siglip")
    settings = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    [path] = folder.glob("checkpoint.*")
    target = file_target(path, settings, EAGER)
    images, texts = verify(target.served, target.eager, (), read_photos(None)[:1])
    assert images.passed
    assert "of texts: not compared; this model takes token ids alone" in texts.reference


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("beit_finetuned", "BeitModel"),
        ("clip", "CLIPVisionModelWithProjection"),
        ("convnext_v1", "ConvNextModel"),
        ("convnext_v2", "ConvNextV2Model"),
        ("deit_iii", "Dinov2Model"),
        ("mae_finetuned", "ViTModel"),
        ("segmenter_original_linear", "DeiTModel"),
    ],
)
def test_transformers_networks_pool_the_same(name: str, kind: str) -> None:
    folder = folder_of(name)
    settings = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    [path] = folder.glob("checkpoint.p*")
    target = file_target(path, settings, EAGER)
    [library] = [each for each in target.libraries if each.name.startswith("transformers")]
    assert re.search(rf"'s {kind}, with the converted weights", library.name)
    *_, found = verify(target.served, target.eager, (library,), read_photos(None)[:1])
    assert found.passed
    assert found.errors.keys() == {"embedding"}


@pytest.mark.parametrize(("registers", "gated"), [(0, True), (2, False), (2, True)])
def test_transformers_has_dinov2_with_registers_and_swiglu(
    registers: int, gated: bool, tmp_path: Path
) -> None:
    state = in_dinov2s_names(dinov2_vit(registers, gated))
    if gated:
        renamed = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
        for ours, theirs in renamed.items():
            state = {key.replace(ours, theirs): value for key, value in state.items()}
    target = file_target(saved(tmp_path / "dinov2.pth", state), {"num_heads": 6}, EAGER)
    [*_, library] = target.libraries
    assert library.name.startswith("transformers")
    assert all(
        comparison.passed
        for comparison in verify(
            target.served, target.eager, target.libraries, read_photos(None)[:1]
        )
    )
