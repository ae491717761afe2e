"""Transformed images to a batch of normalised pixels, on the trunk's device."""

from collections.abc import Sequence

import torch

from models.inputs.transforms import Preprocess


def collate(pixels: Sequence[torch.Tensor], *, pin_memory: bool = False) -> torch.Tensor:
    """Stack transformed images to (B, 3, H, W), in the pixel-by-pixel order they are in already."""
    images_HWC = [image.permute(1, 2, 0) for image in pixels]
    shape = (len(pixels), *images_HWC[0].shape)
    batch = torch.empty(shape, dtype=images_HWC[0].dtype, pin_memory=pin_memory)
    return torch.stack(images_HWC, out=batch).permute(0, 3, 1, 2)


class Normalize(torch.nn.Module):
    """uint8 pixels (..., 3, H, W) to normalised float32. Float pixels are normalised already.

    The steps are torchvision's (`ToTensor`, then `Normalize`), in its order.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: Preprocess) -> None:
        super().__init__()
        self.reversed = spec.channels == "bgr"
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.uint8:
            return pixels
        normalized = pixels.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
        return normalized.flip(-3) if self.reversed else normalized
