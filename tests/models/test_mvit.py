"""MViT beyond its fixtures: other sizes, configurations and channel orders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from timm import create_model
from torch.nn.functional import interpolate

from models import load_checkpoint
from models.checkpoints.containers import open_container
from models.checkpoints.formats import mvit
from models.checkpoints.loading import read_checkpoint
from models.errors import CheckpointError, InputError
from models.inputs.normalize import Normalize
from models.networks.pooling_attention import RelativePositions
from models.reference_outputs import network_of
from tests.models.test_fixtures import fixture, folder_of


def convert(name: str, **changes: Any) -> Any:
    """A fixture's checkpoint with other settings in tables of its configuration."""
    container = open_container(next(iter(folder_of(name).glob("checkpoint.*"))))
    config = yaml.safe_load(container.beside["cfg"])
    for table, values in changes.items():
        config[table] |= values
    beside = {**container.beside, "cfg": yaml.safe_dump(config)}
    return mvit.convert(replace(container, beside=beside), {})


def test_other_sizes_are_taken_where_upstream_takes_them() -> None:
    """SlowFast's code takes one size. The code for images takes smaller ones as well."""
    model, _, _ = fixture("mvit")
    with pytest.raises(InputError, match=r"has 1 x 8 x 8 tokens .* takes 1 x 16 x 16"):
        network_of(model.trunk).forward_features(torch.zeros(1, 3, 32, 32))
    model, _, _ = fixture("mvit_in1k")
    network = network_of(model.trunk)
    with torch.inference_mode():
        assert network.forward_features(torch.zeros(1, 3, 32, 48)).shape[1] == 2 * 3
        with pytest.raises(InputError, match="the input is too large"):
            network.forward_features(torch.zeros(1, 3, 96, 64))


def test_grids_that_strides_do_not_divide_have_resized_positions() -> None:
    """7 cells pooled by 2 are 4, and the table is for 3."""
    table = torch.randn(5, 6)
    resized = interpolate(table.T[None], size=7, mode="linear")[0].T
    positions = RelativePositions(4, 4)
    found = positions(table, resized=True)
    for query in range(4):
        for key in range(4):
            assert torch.equal(found[query, key], resized[query - key + 3])
    with pytest.raises(InputError, match="reach 5 cells, and 7 are needed"):
        positions(table, resized=False)


def test_the_configuration_states_the_transform() -> None:
    statistics = {"MEAN": [0.1, 0.2, 0.3], "STD": [0.4, 0.5, 0.6], "SAMPLING_RATE": 3}
    spec = convert("mvit_video", DATA={**statistics, "REVERSE_INPUT_CHANNEL": True}).preprocess
    assert (spec.mean, spec.std, spec.sampling_rate) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 3)
    clip = torch.randint(0, 256, (1, 4, 3, 2, 2), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    expected = ((clip / 255 - mean) / std)[:, :, [2, 1, 0]]
    assert torch.allclose(Normalize(spec)(clip), expected, atol=1e-6)
    assert spec.digest != replace(spec, channels="rgb").digest
    plain = convert("mvit_video").preprocess
    assert plain.channels == "rgb"
    assert "channels" not in plain.settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MVIT": {"NORM": "batchnorm"}}, "MVIT.NORM must be layernorm"),
        ({"MVIT": {"DEPTH": 7}}, "cannot be built|do not fit"),
        ({"MVIT": {"EMBED_DIM": 16}}, "cannot be built|do not fit"),
        ({"MVIT": {"NUM_HEADS": 5}}, "cannot be built|do not fit"),
        ({"MVIT": {"MODE": "max"}}, "do not fit"),
    ],
)
def test_configurations_of_other_networks_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Any
) -> None:
    path = next(iter(folder_of("mvit").glob("checkpoint.*")))
    content = torch.load(path, weights_only=True)
    config = yaml.safe_load(content["cfg"])
    for table, values in changes.items():
        config[table] |= values
    torch.save(content | {"cfg": yaml.safe_dump(config)}, tmp_path / "changed.pyth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "changed.pyth")


def without_its_head(tmp_path: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A fine-tuned MaskFeat as pre-training saves it, and the file it was made of."""
    path = folder_of("mvit_maskfeat_finetuned") / "checkpoint.pyth"
    content: dict[str, Any] = torch.load(path, weights_only=False)
    kept = {k: v for k, v in content["model_state"].items() if not k.startswith(("norm.", "head."))}
    more = {
        "mask_token": torch.zeros(1, 1, 24),
        "pred_head.projections.0.weight": torch.zeros(3, 96),
        "hogs.0.weight_x": torch.zeros(3, 1, 3, 3),
    }
    pretrained = {**content, "model_state": kept | more, **changes}
    torch.save(pretrained, tmp_path / "pretrained.pyth")
    return tmp_path / "pretrained.pyth", content


def test_maskfeat_is_an_encoder_without_norm_and_head(tmp_path: Path) -> None:
    path, _ = without_its_head(tmp_path)
    checkpoint = read_checkpoint(path, {})
    assert checkpoint.assumed == {"MVIT.USE_MEAN_POOLING": True}
    assert set(checkpoint.dropped) == {
        "mask_token",
        "pred_head.projections.0.weight",
        "hogs.0.weight_x",
    }
    model, finetuned = load_checkpoint(path), fixture("mvit_maskfeat_finetuned")[0]
    assert model.task == "embed"
    clip = torch.randn(2, 3, 4, 32, 32)
    tokens = model.run(clip)["tokens"]
    assert torch.equal(tokens, finetuned.run(clip)["tokens"])
    assert torch.allclose(model.run(clip)["embedding"], tokens[:, 1:].mean(1))


def test_a_vit_is_an_mvit_that_does_not_pool(tmp_path: Path) -> None:
    """As MaskFeat's and MAE's ViTs and Rev-ViT are stored; their configuration is needed."""
    network = create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=4,
                           num_classes=5).eval()  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {
        key.replace("head.", "head.projection."): value
        for key, value in network.state_dict().items()
    }
    config = {"MVIT": {"EMBED_DIM": 48, "NUM_HEADS": 4, "DEPTH": 2, "PATCH_KERNEL": [16, 16],
                       "PATCH_STRIDE": [16, 16], "PATCH_PADDING": [0, 0], "PATCH_2D": True},
              "DATA": {"TRAIN_CROP_SIZE": 32}}  # fmt: skip
    torch.save({"epoch": 1, "model_state": state, "cfg": yaml.safe_dump(config)}, tmp_path / "a.p")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network(pixels)
    assert torch.allclose(
        load_checkpoint(tmp_path / "a.p").run(pixels)["logits"], expected, atol=1e-5
    )
    torch.save({"epoch": 1, "model_state": state}, tmp_path / "b.p")
    with pytest.raises(CheckpointError, match="no configuration"):
        load_checkpoint(tmp_path / "b.p")
