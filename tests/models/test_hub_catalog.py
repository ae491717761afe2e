"""No name in the hub catalog is invented: timm's and open_clip's own lists have each."""

import open_clip
import pytest
import timm
from open_clip.pretrained import get_pretrained_cfg

from models.catalog import ModelEntry, load_catalog
from models.tasks.table import tasks

HUB = load_catalog("hub")
TIMM = {n: t for n, t in HUB.trunks.items() if t.library == "timm"}
OPEN_CLIP = {n: t for n, t in HUB.trunks.items() if t.library == "open_clip"}


def test_the_families_people_run_are_there() -> None:
    names = " ".join(HUB.models)
    for family in (
        "augreg", ".dino", "dinov2", "dinov3", ".mae", "beitv2", "siglip", "convnextv2_atto",
        "convnextv2_huge", "clip-vit-b-32.openai", "laion2b", "datacomp", "mobileclip",
    ):  # fmt: skip
        assert family in names
    assert HUB.startup == ()


@pytest.mark.parametrize("name", TIMM)
def test_timm_lists_it(name: str) -> None:
    assert name in timm.list_pretrained()
    config = timm.get_pretrained_cfg(name)
    assert TIMM[name].source == f"hf-hub:{config.hf_hub_id}"
    model = HUB.models[name]
    assert (model.task == "classify") == bool(config.num_classes)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_lists_it(name: str) -> None:
    trunk = OPEN_CLIP[name]
    assert (trunk.architecture, trunk.pretrained) in open_clip.list_pretrained()
    config = get_pretrained_cfg(trunk.architecture, trunk.pretrained)
    assert trunk.source == f"hf-hub:{config['hf_hub'].strip('/')}"


@pytest.mark.parametrize("model", HUB.models.values(), ids=lambda model: model.name)
def test_every_entry_says_what_it_is(model: ModelEntry) -> None:
    assert model.task in tasks()
    assert model.licence != "unknown"
    assert model.parameters
    assert model.description
