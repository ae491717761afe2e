"""What a file and its arguments do not determine is refused, or listed as assumed."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import load_checkpoint
from models.checkpoints.containers import Container, open_container
from models.checkpoints.formats import checkpoint_formats
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError, ModelsError
from tests.models.test_fixtures import FIRST_ROUND, GOLDENS, GOLDENS2

# Damaged weights have sizes that torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")
# Heads and layouts that files of these kinds prove, or that their authors published once.
DETERMINED = {"beit", "clip", "clip_dense", "clip_jit", "mvit", "pit"}


KINDS = [
    pytest.param(path.parent, id=f"{path.parents[1].name}-{path.parent.name}")
    for folder in (GOLDENS, GOLDENS2)
    for path in sorted(folder.glob("*/meta.json"))
    if any(path.parent.glob("checkpoint*"))
]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint*"))


def hyperparameters(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    return settings


def matching(container: Container, arguments: dict[str, Any]) -> list[str]:
    return [item.NAME for item in checkpoint_formats() if item.matches(container, arguments)]


@pytest.mark.parametrize("folder", KINDS)
def test_a_file_is_of_one_format_or_refused(folder: Path) -> None:
    """With its arguments and without: no format takes a file that is another's."""
    for path in files_of(folder):
        container = open_container(path)
        for arguments in ({}, hyperparameters(folder)):
            found = matching(container, arguments)
            assert len(found) <= 1, path.name
            if folder.parent == GOLDENS:
                assert found, path.name
            try:
                checkpoint = read_checkpoint(path, arguments)
            except CheckpointError:
                continue
            assert found, path.name
            assert not checkpoint.assumed.keys() & arguments.keys(), path.name


@pytest.mark.parametrize("name", [name for name in FIRST_ROUND if name not in DETERMINED])
def test_without_its_arguments_nothing_is_served_wrong(name: str) -> None:
    """Either what shapes do not tell is refused or assumed aloud, or the network is the same."""
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    [path, *_] = files_of(folder)
    try:
        silent = read_checkpoint(path, {})
    except CheckpointError:
        return
    if silent.assumed:
        return
    stated = read_checkpoint(path, hyperparameters(folder))
    assert silent.arguments == stated.arguments


ARGUMENT = "set (num_heads|vision_heads|outer_num_heads|heads|configs)"


@pytest.mark.parametrize("name", ["dino_backbone", "mae", "a_clip", "ms_clip", "tnt", "pit",
                                  "pyramid_tnt", "vqt", "moco_v3"])  # fmt: skip
def test_head_counts_of_unpublished_widths_are_asked_for(name: str) -> None:
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    with pytest.raises(CheckpointError, match=ARGUMENT):
        load_checkpoint(files_of(folder)[0])


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (256, None)]
)
def test_published_widths_have_their_heads(width: int, heads: int | None, tmp_path: Path) -> None:
    """ViT-H has heads of 80 channels, unlike all smaller ones."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 5, width), "norm.weight": (width,),
        "norm.bias": (width,), "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,), "blocks.0.norm1.weight": (width,),
        "blocks.0.norm1.bias": (width,), "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.qkv.bias": (3 * width,), "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.attn.proj.bias": (width,), "blocks.0.norm2.weight": (width,),
        "blocks.0.norm2.bias": (width,), "blocks.0.mlp.fc1.weight": (4 * width, width),
        "blocks.0.mlp.fc1.bias": (4 * width,), "blocks.0.mlp.fc2.weight": (width, 4 * width),
        "blocks.0.mlp.fc2.bias": (width,),
    }  # fmt: skip
    path = tmp_path / "backbone.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    if heads is None:
        with pytest.raises(CheckpointError, match=r"set num_heads: one of 2, 4, 8, 16, 32"):
            read_checkpoint(path, {})
        return
    checkpoint = read_checkpoint(path, {})
    assert checkpoint.arguments["num_heads"] == heads
    assert checkpoint.assumed == {"num_heads": heads}


@pytest.mark.parametrize("folder", KINDS)
def test_damaged_files_raise_errors_of_ours_alone(folder: Path, tmp_path: Path) -> None:
    """Cut off, and with weights gone or of another shape."""
    for companion in folder.iterdir():
        if companion.name.startswith(("backbone", "open_clip_config")):
            (tmp_path / companion.name).symlink_to(companion)
    path = files_of(folder)[-1]
    data = path.read_bytes()
    cut = tmp_path / path.name
    for length in (0, len(data) // 2, len(data) - 100):
        cut.write_bytes(data[:length])
        with pytest.raises(ModelsError):
            load_checkpoint(cut, hyperparameters(folder))
    cut.unlink()
    tensors = dict(open_container(path).tensors)
    arguments = hyperparameters(folder)
    changed = tmp_path / "changed.pth"
    wrapper = open_container(path).wrapper
    keys = list(tensors)
    for key in keys[:: max(1, len(keys) // 3)]:
        for value in (None, torch.zeros(3)):
            mutated = {k: v for k, v in tensors.items() if k != key}
            if value is not None:
                mutated[key] = value
            torch.save({wrapper: mutated} if wrapper else mutated, changed)
            with suppress(ModelsError):
                load_checkpoint(changed, arguments)


@pytest.mark.parametrize("value", ["many", -3, 0, 7, [1, 2], None, {"a": 1}])
@pytest.mark.parametrize("name", ["dino_backbone", "mae_finetuned", "clip", "pit", "tnt", "slip"])
def test_arguments_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    folder = (GOLDENS2 if name == "slip" else GOLDENS) / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here")
    names = ("num_heads", "heads", "vision_heads", "outer_num_heads", "transformer_heads")
    [path, *_] = files_of(folder)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, hyperparameters(folder) | dict.fromkeys(names, value))


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("tinymim", "last_heads", 0),
        ("patchconvnet", "num_heads", 0),
        ("vitgan", "token_width", 0),
        ("vitgan_inr", "size", 0),
        ("supmae", "global_pool", []),
        ("scale_mae", "band_config", [56, 7]),
        ("scale_mae", "band_config", [7]),
    ],
)
def test_an_argument_that_only_outputs_would_show_is_refused(
    name: str, argument: str, value: Any
) -> None:
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    [path, *_] = files_of(folder)
    with pytest.raises(CheckpointError, match=argument):
        read_checkpoint(path, hyperparameters(folder) | {argument: value})


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("supmae", "cls_head.1.running_mean", lambda key, value: {key: torch.tensor(1.0)}),
        ("convnext_v2", "norm.bias", lambda key, value: {f"{key}.x": value}),
        ("vitgan", "convs.2.conv.weight", lambda key, value: {key: torch.cat([value, value])}),
        ("supmae", "cls_head.0.weight", lambda key, value: {key: value[:, :-1].clone()}),
        ("scale_mae_finetuned", "pos_embed", lambda key, value: {key: value.transpose(0, 1)}),
        ("sit", "head_recons.convTrans.weight", lambda key, value: {key: value.transpose(0, 1)}),
        ("sit", "head_recons.mlp.2.bias", lambda key, value: {}),
    ],
)
def test_one_tensor_that_is_not_as_it_should_be_is_seen(
    name: str, key: str, change: Any, tmp_path: Path
) -> None:
    """Of another shape or name, where its network would not tell."""
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    [path, *_] = files_of(folder)
    container = open_container(path)
    tensors = dict(container.tensors)
    tensors |= change(key, tensors.pop(key))
    torch.save({container.wrapper: tensors} if container.wrapper else tensors, tmp_path / path.name)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / path.name, hyperparameters(folder))
