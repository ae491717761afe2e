"""What the scripts of A-CLIP and FT-CLIP may have trained beside the fixtures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import load_checkpoint
from models.checkpoints.formats.ft_clip import _preprocess
from models.checkpoints.loading import read_checkpoint
from tests.models.test_fixtures import folder_of

CLIP, IMAGENET = (0.48145466, 0.4578275, 0.40821073), (0.485, 0.456, 0.406)


def widened(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Zeros of the shapes that towers of another width have."""
    wide = {}
    own = state["module.visual.cls_token"].shape[-1]
    for key, value in state.items():
        image = key.startswith(("module.visual", "module.image_projection"))
        sizes = [
            n // own * width if image and axis < 2 and n % own == 0 else n
            for axis, n in enumerate(value.shape)
        ]
        if key.endswith("cls_token"):
            sizes[2] = width
        if key.endswith("pos_embed"):
            sizes = [1, value.shape[1], width]
        wide[key] = torch.zeros(sizes, dtype=value.dtype)
    return wide


@pytest.mark.parametrize(("width", "heads"), [(384, 12), (768, 12), (1024, 16)])
def test_a_clips_small_image_tower_has_twelve_heads(width: int, heads: int, tmp_path: Path) -> None:
    """Of 32 channels each, unlike other ViTs of its width (ACLIP_VITS16)."""
    content = torch.load(folder_of("a_clip") / "checkpoint.pth", weights_only=False)
    content["state_dict"] = widened(content["state_dict"], width)
    torch.save(content, tmp_path / "checkpoint.pth")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth", {"transformer_heads": 2})
    assert checkpoint.arguments["image"]["num_heads"] == heads
    assert checkpoint.assumed == {"vision_heads": heads}


@pytest.mark.parametrize(
    ("script", "mean", "crop_pct"),
    [
        ({"crop_pct": 0.875}, CLIP, 0.875),
        ({"clip_mean_and_std": False}, (0.5, 0.5, 0.5), 1.0),
        (
            {"clip_mean_and_std": False, "imagenet_default_mean_and_std": True},
            IMAGENET,
            1.0,
        ),
    ],
)
def test_ft_clips_script_tells_how_pixels_are_normalised(
    script: dict[str, Any], mean: tuple[float, ...], crop_pct: float, tmp_path: Path
) -> None:
    content = torch.load(folder_of("ft_clip") / "checkpoint.pth", weights_only=False)
    vars(content["args"]).update(script)
    torch.save(content, tmp_path / "checkpoint.pth")
    model = load_checkpoint(tmp_path / "checkpoint.pth", {"heads": 4})
    assert model.trunk.preprocess.mean == mean
    assert model.trunk.preprocess.crop_pct == crop_pct


@pytest.mark.parametrize(
    ("arguments", "mean"),
    [
        ({"imagenet_default_mean_and_std": True}, IMAGENET),
        ({"imagenet_default_mean_and_std": False}, CLIP),
        ({"imagenet_default_mean_and_std": True, "clip_mean_and_std": True}, CLIP),
    ],
)
@pytest.mark.parametrize("script", [{}, {"clip_mean_and_std": True}])
def test_imagenets_statistics_alone_are_stated_for_ft_clip(
    script: dict[str, Any], arguments: dict[str, Any], mean: tuple[float, ...]
) -> None:
    assert _preprocess(arguments, script).mean == mean
