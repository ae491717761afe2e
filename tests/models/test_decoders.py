"""Decoders of segmentation against other code of the same networks."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, interpolate, relu
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTNeck

from models.networks.dpt import with_class_token
from models.segmentation.decoders import create_decoder

HEAD = "decode_head."


def randomized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values of the same shapes; variances are positive."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(value.shape, generator=generator) + 0.5
        if key.endswith("running_var")
        else torch.randn(value.shape, generator=generator) * 0.2
        if value.is_floating_point()
        else value
        for key, value in state.items()
    }


def created(state: dict[str, Tensor], settings: dict[str, Any]) -> nn.Module:
    named = {f"{HEAD}{key}": value for key, value in state.items()}
    decoder = create_decoder(named, settings).eval()
    decoder.load_state_dict(named)
    return decoder


def convolved(state: dict[str, Tensor], name: str, x: Tensor, padding: int = 0) -> Tensor:
    """A convolution, its batch norm, and a ReLU."""
    mean, variance, weight, bias = (
        state[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
    )
    x = conv2d(x, state[f"{name}.conv.weight"], padding=padding)
    return relu(batch_norm(x, mean, variance, weight, bias))


def conv_state(name: str, outputs: int, inputs: int, size: int) -> dict[str, Tensor]:
    state = {f"{name}.conv.weight": torch.zeros(outputs, inputs, size, size)}
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"{name}.bn.{part}"] = torch.zeros(outputs)
    return state | {f"{name}.bn.num_batches_tracked": torch.tensor(1)}


def test_a_psp_head_pools_a_map_at_several_scales() -> None:
    scales = (1, 3)
    state = conv_state("bottleneck", 6, 10 + 2 * 6, 3)
    for number in range(len(scales)):
        state |= conv_state(f"psp_modules.{number}.1", 6, 10, 1)
    state |= {"conv_seg.weight": torch.zeros(4, 6, 1, 1), "conv_seg.bias": torch.zeros(4)}
    state = randomized(state)
    x = torch.randn(2, 10, 5, 7)
    pooled = [
        interpolate(
            convolved(state, f"psp_modules.{number}.1", adaptive_avg_pool2d(x, scale)),
            size=(5, 7),
            mode="bilinear",
        )
        for number, scale in enumerate(scales)
    ]
    bottled = convolved(state, "bottleneck", torch.cat([x, *pooled], 1), 1)
    expected = conv2d(bottled, state["conv_seg.weight"], state["conv_seg.bias"])
    settings = {"inputs": [3, 10], "in_index": [1], "pool_scales": scales}
    with torch.no_grad():
        found = created(state, settings)([torch.randn(2, 3, 9, 9), x])
    torch.testing.assert_close(found, expected)


# From transformers' names to mmsegmentation's.
DPT_NAMES = (
    (r"reassemble_stage\.layers\.(\d+)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
    (r"reassemble_stage\.layers\.(\d+)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
    (r"reassemble_stage\.readout_projects\.", r"reassemble_blocks.readout_projects."),
    (r"^convs\.(\d+)\.", r"convs.\1.conv."),
    (r"fusion_stage\.layers\.(\d+)\.residual_layer(\d)\.", r"fusion_blocks.\1.res_conv_unit\2."),
    (r"fusion_stage\.layers\.(\d+)\.projection\.", r"fusion_blocks.\1.project.conv."),
    (r"\.convolution(\d)\.", r".conv\1.conv."),
    (r"\.batch_norm(\d)\.", r".conv\1.bn."),
)


@pytest.mark.parametrize("readout", ["project", "add", "ignore"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_dpt_head_fuses_as_transformers_does(readout: Any, norm: bool) -> None:
    config = DPTConfig(
        hidden_size=12, neck_hidden_sizes=[4, 6, 8, 10], fusion_hidden_size=5,
        readout_type=readout, use_batch_norm_in_fusion_residual=norm,
        use_bias_in_fusion_residual=False,
    )  # fmt: skip
    neck = DPTNeck(config).eval()
    neck.load_state_dict(randomized(neck.state_dict()))
    state = {}
    for key, value in neck.state_dict().items():
        for theirs, ours in DPT_NAMES:
            key = re.sub(theirs, ours, key)
        if not key.startswith("fusion_blocks.0.res_conv_unit1"):  # never used
            state[key] = value
    last = conv_state("project", 5, 5, 3)
    if not norm:
        last = {
            "project.conv.weight": last["project.conv.weight"],
            "project.conv.bias": torch.zeros(5),
        }
    last |= {"conv_seg.weight": torch.zeros(3, 5, 1, 1), "conv_seg.bias": torch.zeros(3)}
    last = randomized(last)
    blocks = [torch.randn(2, 1 + 3 * 4, 12) for _ in range(4)]
    settings = {"inputs": [24] * 4, "readout": readout}
    maps = [
        with_class_token(torch.unflatten(x[:, 1:].transpose(1, 2), 2, (3, 4)), x[:, 0])
        for x in blocks
    ]
    with torch.no_grad():
        fused = neck(blocks, 3, 4)[-1]
        if norm:
            projected = convolved(last, "project", fused, 1)
        else:
            weight, bias = last["project.conv.weight"], last["project.conv.bias"]
            projected = relu(conv2d(fused, weight, bias, padding=1))
        expected = conv2d(projected, last["conv_seg.weight"], last["conv_seg.bias"])
        found = created(state | last, settings)(maps)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
