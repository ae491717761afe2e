"""DPT's head (arXiv 2103.13413): four levels of a plain ViT, fused from the coarsest up."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.networks.dpt import Fusions, Readout
from models.segmentation.decoders.layers import Pyramid

TYPES = ("DPTHead",)
MARK = "reassemble_blocks.projects.0.conv.weight"
READOUTS: tuple[Readout, ...] = ("project", "add", "ignore")


class DptHead(Fusions):
    """Fused levels, then a 1x1 convolution. Levels have the class token's channels."""

    def __init__(
        self, dim: int, channels: Sequence[int], width: int, classes: int, readout: Readout, *,
        norm: bool,
    ) -> None:  # fmt: skip
        super().__init__(dim, channels, width, readout, norm=norm)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        logits: Tensor = self.conv_seg(self.fused(maps))
        return logits


def create(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> nn.Module:
    """`settings`: `readout`, one of `READOUTS`.

    Raises:
        KeyError: there is no `readout`, which no shape determines.
        ValueError: it is none of those, or there are not four levels.
    """
    readout = settings["readout"]
    if readout not in READOUTS or len(inputs) != 4:
        raise ValueError(f"readout is {readout!r}, and {len(inputs)} levels; a DPT reads four")
    projects = [tensors[f"reassemble_blocks.projects.{n}.conv.weight"].shape for n in range(4)]
    classes, width = tensors["conv_seg.weight"].shape[:2]
    return DptHead(
        projects[0][1],
        [shape[0] for shape in projects],
        width,
        classes,
        readout,
        norm="project.bn.weight" in tensors,
    )
