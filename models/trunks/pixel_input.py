"""The step before a network of pixels.

Shape suffixes: B batch, C channels, H W pixels.
"""

from torch import Tensor, nn

from models.inputs.normalize import Normalize
from models.inputs.transforms import Preprocess
from models.trunks.devices import Placement


class PixelInput(nn.Module):
    """Pixels as a network takes them: normalised, in its dtype and memory layout."""

    def __init__(self, preprocess: Preprocess, placement: Placement) -> None:
        super().__init__()
        self.normalize = Normalize(preprocess).to(placement.device)
        self.dtype = placement.dtype
        self._memory_format = placement.memory_format

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        pixels_BCHW = self.normalize(pixels_BCHW)
        return pixels_BCHW.to(self.dtype, memory_format=self._memory_format)
