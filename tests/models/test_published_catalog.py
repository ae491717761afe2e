"""The catalog of published checkpoints: every system has a line, and each line can be read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
from PIL import Image

from models import Registry
from models.catalog import load_catalog
from models.errors import SourceError
from tests.models.test_fixtures import GOLDENS

CATALOG = load_catalog("published")
# What a file of that name would hold, by the fixture of that layout.
LIKE = {
    "dino-vits16": ("dino_backbone", "checkpoint.pth"),
    "dino-vits16-full": ("dino", "checkpoint.pth"),
    "ibot-vits16": ("ibot_backbone", "checkpoint.pth"),
    "ibot-swint7": ("ibot_swin", "checkpoint.pth"),
    "mocov3-vits": ("moco_v3", "checkpoint.pth"),
    "esvit-swin-tiny-w7": ("esvit", "checkpoint.pth"),
    "sit-vits16": ("sit", "checkpoint.pth"),
    "mae-vit-base": ("mae", "checkpoint_encoder_only.pth"),
    "mae-vit-base-draws": ("mae", "checkpoint.pth"),
    "scalemae-vitl": ("scale_mae", "checkpoint.pth"),
    "tinymim-vitb": ("tinymim", "checkpoint.pth"),
    "beit-base": ("beit", "checkpoint.pth"),
    "peco-base": ("peco", "checkpoint.pth"),
    "convnextv2-atto-fcmae": ("convnext_v2_fcmae", "checkpoint_pt_only.pt"),
    "vitgan": ("vitgan", "checkpoint.pt"),
    "beit-base-ade20k": ("semantic_segmentation", "checkpoint.pth"),
    "upernet-convnext-tiny-1k-512x512": ("semantic_segmentation_convnext", "checkpoint.pth"),
}
# What the shapes of small networks do not tell.
HEADS = ("num_heads", "finetune_num_heads", "vision_heads", "transformer_heads")


def test_nothing_is_loaded_that_nobody_asked_for() -> None:
    assert CATALOG.startup == ()


@pytest.mark.parametrize("name", CATALOG.trunks)
def test_every_source_is_a_known_hub_name_or_tells_where_it_is_to_be_had(name: str) -> None:
    trunk = CATALOG.trunks[name]
    if trunk.source.startswith("hf-hub:"):
        assert name in timm.list_pretrained()
        assert trunk.source == f"hf-hub:{timm.get_pretrained_cfg(name).hf_hub_id}"
    else:
        assert trunk.source.startswith("file:checkpoints/")
        assert trunk.origin


@pytest.mark.parametrize("name", CATALOG.models)
def test_every_model_names_its_paper_and_licence(name: str) -> None:
    model = CATALOG.models[name]
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}", model.paper)
    assert model.licence
    assert model.description


def test_every_paper_of_the_fixtures_has_a_line() -> None:
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    papers = {model.paper.removeprefix("arXiv ") for model in CATALOG.models.values()}
    for path in sorted(GOLDENS.glob("*/meta.json")):
        named = re.findall(r"\d{4}\.\d{5}", json.loads(path.read_text())["paper"])
        assert papers & set(named), f"{path.parent.name}: {named}"


def test_a_file_that_is_not_there_is_told_with_where_to_get_it(tmp_path: Path) -> None:
    shutil.copy(CATALOG.path, tmp_path / "mine.toml")
    registry = Registry.from_catalog(tmp_path / "mine.toml", device="cpu")
    with pytest.raises(SourceError, match=r"get it from github\.com/facebookresearch/dino"):
        registry.get("dino-vits16")


@pytest.mark.parametrize("name", LIKE)
def test_a_file_of_that_name_is_served(
    name: str, tmp_path: Path, photos: dict[str, Image.Image]
) -> None:
    """Small ones of the same layouts stand for the published files."""
    folder, file = LIKE[name]
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    source = CATALOG.trunks[CATALOG.models[name].trunk].source.removeprefix("file:")
    target = tmp_path / source
    target.parent.mkdir(parents=True)
    shutil.copy(GOLDENS / folder / file, target)
    settings = json.loads((GOLDENS / folder / "meta.json").read_text())["hyperparameters"]
    stated = [f"{key} = {settings[key]}" for key in HEADS if key in settings]
    trunk = f"[trunks.{CATALOG.models[name].trunk}]\n"
    text = CATALOG.path.read_text()
    if "arguments" not in text.split(trunk)[1].split("[")[0]:
        text = text.replace(trunk, f"{trunk}arguments = {{{', '.join(stated)}}}\n")
    (tmp_path / "mine.toml").write_text(text)
    model = Registry.from_catalog(tmp_path / "mine.toml", device="cpu").get(name)
    assert model.task == CATALOG.models[name].task
    if model.trunk.modality == "image":
        [answer] = model.predict([photos["coffee"]])
        assert answer
