"""MViT beyond its fixtures: other sizes, configurations and channel orders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import interpolate

from models import load_checkpoint
from models.checkpoints.containers import open_container
from models.checkpoints.formats import mvit
from models.errors import CheckpointError, InputError
from models.inputs.transforms import Normalize
from models.networks.pooling_attention import relative
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
    found = relative(table, 4, 4, resized=True)
    for query in range(4):
        for key in range(4):
            assert torch.equal(found[query, key], resized[query - key + 3])
    with pytest.raises(InputError, match="reach 5 cells, and 7 are needed"):
        relative(table, 4, 4, resized=False)


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
