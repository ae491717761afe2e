"""The other models of SLIP's zoo: CLIP, SimCLR, and ViT-S with its twelve heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models import load_checkpoint
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError
from tests.models.test_fixtures import folder_of


def rewritten(folder: Path, tmp_path: Path, change: Any) -> Path:
    content = torch.load(folder / "checkpoint.pt", weights_only=False)
    content["state_dict"] = change(content["state_dict"])
    torch.save(content, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def test_clip_has_no_projector_and_simclr_no_text(tmp_path: Path) -> None:
    folder = folder_of("slip")
    golden = load_file(folder / "golden.safetensors")
    path = rewritten(
        folder, tmp_path, lambda s: {k: v for k, v in s.items() if "image_mlp" not in k}
    )
    heads = {"vision_heads": 4, "transformer_heads": 1}
    clip = load_checkpoint(path, heads)
    outputs = clip.run(golden["pixel_values"], golden["token_ids"])
    for key in ("image_embedding", "text_embedding"):
        assert torch.allclose(outputs[key], golden[key], atol=1e-5), key
    projection = torch.load(path, weights_only=False)["state_dict"]["module.image_projection"]
    path = rewritten(
        folder,
        tmp_path,
        lambda s: {k: v for k, v in s.items() if k.startswith(("module.visual", "module.image_m"))},
    )
    simclr = load_checkpoint(path, heads)
    assert simclr.task == "embed"
    embedding = simclr.run(golden["pixel_values"])["embedding"]
    assert torch.allclose(embedding @ projection, golden["image_embedding"], atol=1e-5)


def test_unknown_weights_and_widths_are_refused(tmp_path: Path) -> None:
    folder = folder_of("slip")
    with pytest.raises(CheckpointError, match="set vision_heads: one of 1, 2, 3, 4, 6"):
        read_checkpoint(folder / "checkpoint.pt", {})
    path = rewritten(folder, tmp_path, lambda s: s | {"module.extra.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"left over: extra\.weight"):
        read_checkpoint(path, {"vision_heads": 4, "transformer_heads": 1})
