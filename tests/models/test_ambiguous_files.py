"""Files that look like another kind's: what tells them apart decides, or they are refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from models import load_checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.open_clip import OPENAI_SETTINGS, Configuration, read_configuration
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError
from tests.models.test_classification_families import pixels, randomised
from tests.models.test_fixtures import fixture, folder_of

HALF = (0.5, 0.5, 0.5)


def configured(settings: tuple[str, ...] = (), **arguments: str) -> Configuration:
    tensors = {name: torch.tensor(0) for name in settings}
    return read_configuration(Container(Path("/nowhere/file.pt"), tensors), arguments)


@pytest.mark.parametrize(
    ("architecture", "tag", "quick"),
    [
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-L-14", "metaclip_400m", True),
        ("ViT-L-14-quickgelu", "dfn2b", True),
    ],
)
def test_open_clips_tags_tell_the_activation(architecture: str, tag: str, quick: bool) -> None:
    """open_clip has one name of an architecture for weights of either activation, and warns."""
    config = configured(architecture=architecture, pretrained=tag)
    assert config.quick_gelu is quick
    assert "quick_gelu" not in config.assumed


def test_open_clips_tags_tell_the_transform() -> None:
    config = configured(architecture="ViT-L-14", pretrained="laion2b_s32b_b82k")
    assert config.transform.mean == HALF
    assert configured(architecture="ViT-L-14", pretrained="openai").transform.mean != HALF
    with pytest.raises(CheckpointError, match="no weights 'mine' of ViT-L-14; it has openai, "):
        configured(architecture="ViT-L-14", pretrained="mine")


def test_an_activation_that_only_a_tag_tells_is_assumed() -> None:
    assert configured(architecture="ViT-B-32").assumed["quick_gelu"] is False
    assert "quick_gelu" not in configured(architecture="ViT-B-32-quickgelu").assumed


def test_openais_files_have_quick_gelu_whatever_names_their_architecture(tmp_path: Path) -> None:
    config = configured(OPENAI_SETTINGS, architecture="ViT-B-32")
    assert config.quick_gelu
    assert not config.assumed


@pytest.mark.parametrize(
    ("stated", "served"), [(None, "state_dict_ema"), ("state_dict", "state_dict")]
)
def test_the_average_of_a_training_run_of_timms_is_served(
    stated: str | None, served: str, tmp_path: Path
) -> None:
    """As `timm.create_model(checkpoint_path=...)` loads it."""
    networks = {
        name: randomised(timm.create_model("test_vit", num_classes=5), seed)
        for seed, name in enumerate(("state_dict", "state_dict_ema"))
    }
    content: dict[str, Any] = {name: each.state_dict() for name, each in networks.items()}
    torch.save({"epoch": 3, "arch": "test_vit", **content}, tmp_path / "last.pth.tar")
    arguments = {"architecture": "test_vit"} | ({"weights": stated} if stated else {})
    path = tmp_path / "last.pth.tar"
    found = load_checkpoint(path, arguments).run(pixels(160, 160))["logits"]
    assert torch.allclose(found, networks[served](pixels(160, 160)), atol=1e-5)
    assumed = read_checkpoint(path, arguments).assumed
    assert assumed == ({} if stated else {"weights": "state_dict_ema"})


@pytest.mark.parametrize(
    ("table", "change"),
    [("DETECTION", {"ENABLE": True}), ("MODEL", {"HEAD_ACT": "sigmoid"})],
)
def test_mvits_of_another_task_are_refused(
    table: str, change: dict[str, Any], tmp_path: Path
) -> None:
    """A detector's weights and those of a classifier of several labels are a classifier's."""
    content = torch.load(folder_of("mvit_video") / "checkpoint.pyth", weights_only=False)
    config = yaml.safe_load(content["cfg"])
    config[table] = {**config.get(table, {}), **change}
    torch.save({**content, "cfg": yaml.safe_dump(config)}, tmp_path / "checkpoint.pyth")
    with pytest.raises(CheckpointError, match=rf"{table}\.{next(iter(change))}"):
        read_checkpoint(tmp_path / "checkpoint.pyth", {})


def test_compiled_networks_have_a_prefix(tmp_path: Path) -> None:
    plain, golden, meta = fixture("dino_backbone")
    state = torch.load(folder_of("dino_backbone") / "checkpoint.pth")
    named = {f"_orig_mod.{key}": value for key, value in state.items()}
    torch.save(named, tmp_path / "compiled.pth")
    model = load_checkpoint(tmp_path / "compiled.pth", meta["hyperparameters"])
    found = model.run(golden["pixel_values"])["embedding"]
    assert torch.equal(found, plain.run(golden["pixel_values"])["embedding"])


@pytest.mark.parametrize(
    "key",
    [
        "vit.embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.weight",
        "swin.embeddings.patch_embeddings.projection.weight",
        "segformer.encoder.patch_embeddings.0.proj.weight",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    ],
)
def test_transformers_own_files_are_refused_by_name(key: str, tmp_path: Path) -> None:
    torch.save({key: torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="transformers' names"):
        read_checkpoint(tmp_path / "pytorch_model.bin", {})
    with pytest.raises(CheckpointError, match="is a folder; name the checkpoint file in it"):
        read_checkpoint(tmp_path, {})
