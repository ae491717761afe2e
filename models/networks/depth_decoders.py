"""DINOv2's decoders of depth (arXiv 2304.07193, github.com/facebookresearch/dinov2).

They read blocks of a plain ViT as levels (B, 2 D, h, w), patches with the class token's channels
(see `dpt.py`), and return depth (B, 1, h', w'). Module names are the checkpoints'.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from models.networks.dpt import Fusions, Readout

SHIFT = 0.1  # added to each bin's score, so that their sum is never 0


class LinearDepth(nn.Module):
    """Scores of evenly spaced depths for each patch; the depth is their mean, weighted by score.

    Args:
        inputs: channels of all levels, class tokens included.
        bins: how many depths there are from `minimum` to `maximum` metres.
        upsample: the factor by which maps are resized before they are scored.
    """

    def __init__(
        self, inputs: int, bins: int, *, minimum: float, maximum: float, upsample: int
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.range = (minimum, maximum)
        self.conv_depth = nn.Conv2d(inputs, bins, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = [side * self.upsample for side in levels[0].shape[2:]]
        resized = [interpolate(x, size=size, mode="bilinear") for x in levels]
        scores = relu(self._scores(torch.cat(resized, 1))) + SHIFT
        shares = scores / scores.sum(1, keepdim=True)
        depths = torch.linspace(*self.range, shares.shape[1], device=shares.device)
        return torch.einsum("bkhw,k->bhw", shares, depths.to(shares))[:, None].clamp(*self.range)

    def _scores(self, x: Tensor) -> Tensor:
        """The convolution as a plain matrix product, whose sums do not depend on the number of
        threads: at 80 m the last bits of float32 are more than 1e-5."""
        weight, bias = self.conv_depth.weight.flatten(1), self.conv_depth.bias
        assert bias is not None
        batch, columns = x.shape[0], x.flatten(2)
        biases = bias[None, :, None].expand(batch, -1, columns.shape[2])
        products = torch.baddbmm(biases, weight.expand(batch, -1, -1), columns)
        return torch.unflatten(products, 2, tuple(x.shape[2:]))


class DepthHead(nn.Module):
    """The last convolutions, (B, C, h, w) to (B, 1, 2h, 2w)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(dim // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        depth: Tensor = self.head(x)
        return depth


class DptDepth(Fusions):
    """A dense prediction transformer's decoder of four levels."""

    def __init__(
        self, dim: int, channels: Sequence[int], width: int, hidden: int, *, minimum: float,
        maximum: float, readout: Readout,
    ) -> None:  # fmt: skip
        super().__init__(dim, channels, width, readout)
        self.range = (minimum, maximum)
        self.conv_depth = DepthHead(width, hidden)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        depth = relu(self.conv_depth(self.fused(levels))) + self.range[0]
        return depth.clamp(*self.range)


def create_depth_decoder(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    """A decoder without its weights.

    Args:
        settings: `minimum` and `maximum` in metres; `upsample` of a `LinearDepth`.

    Raises:
        KeyError: a tensor or a setting is missing.
    """
    limits = {"minimum": float(settings["minimum"]), "maximum": float(settings["maximum"])}
    if "conv_depth.weight" in tensors:
        bins, inputs = tensors["conv_depth.weight"].shape[:2]
        return LinearDepth(inputs, bins, **limits, upsample=int(settings["upsample"]))
    has_projects = "reassemble_blocks.readout_projects.0.0.weight" in tensors
    readout: Readout = "project" if has_projects else "ignore"
    projects = [tensors[f"reassemble_blocks.projects.{n}.conv.weight"].shape for n in range(4)]
    return DptDepth(
        projects[0][1],
        [shape[0] for shape in projects],
        tensors["project.conv.weight"].shape[0],
        tensors["conv_depth.head.2.weight"].shape[0],
        **limits,
        readout=readout,
    )
