"""Swin at sizes that windows do not divide: padded before the shift, as upstream does."""

from functools import partial

import pytest
import torch
from torch import nn

from models.networks.padded_swin import Block
from models.networks.swin import Swin


@pytest.mark.parametrize("side", [40, 32, 44, 64])
@pytest.mark.parametrize("number", [0, 1])
def test_blocks_agree_with_those_of_segmentation(side: int, number: int) -> None:
    """Two implementations of upstream's padding, at the network's own size and at others."""
    torch.manual_seed(0)
    network = Swin(img_size=40, patch_size=4, embed_dim=8, depths=(2,), num_heads=(2,),
                   window_size=4, num_classes=0).eval()  # fmt: skip
    block = network.layers[0].blocks[number]
    norm = partial(nn.LayerNorm, eps=1e-6)
    other = Block(8, 2, 4, 2 * number, 4.0, qkv_bias=True, norm=norm).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, side // 4, side // 4, 8)
    with torch.inference_mode():
        assert torch.allclose(block(x), other(x), atol=1e-5)


def test_other_sizes_run_and_attention_is_of_whole_windows() -> None:
    network = Swin(img_size=32, patch_size=4, embed_dim=8, depths=(2,), num_heads=(2,),
                   window_size=4, num_classes=0).eval()  # fmt: skip
    with torch.inference_mode():
        outputs, last_input = network.block_outputs(torch.randn(1, 3, 40, 40))
        attention = network.last_attention(last_input)
    assert outputs[-1].shape == (1, 10, 10, 8)
    assert attention.shape == (9, 2, 16, 16)
    assert torch.allclose(attention.sum(-1), torch.ones(9, 2, 16))
