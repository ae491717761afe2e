"""What trunks that take images share."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.inputs.jpeg_file import JpegFile
from models.inputs.normalize import Normalize, collate
from models.inputs.numbers import to_numbers
from models.inputs.samples import sample_photos
from models.inputs.tensor_transform import TensorTransform
from models.inputs.transforms import Preprocess, create_transform
from models.trunks.base import Trunk
from models.trunks.calibration import read_images
from models.trunks.devices import Placement
from models.trunks.jpeg_batch import JpegBatch, JpegInputs


class ImageTrunk(Trunk):
    """A trunk with a transform of images, of which it makes batches."""

    preprocess: Preprocess

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Preprocess, placement: Placement
    ) -> None:
        preprocess = replace(preprocess, transform=placement.transform)
        self._transform = create_transform(preprocess)
        self._jpegs: JpegInputs | None = None
        if isinstance(self._transform, TensorTransform):
            self._jpegs = JpegInputs(preprocess, self._transform, placement.device)
        super().__init__(architecture, network, preprocess, placement)

    @property
    def min_side(self) -> int | None:
        return self.preprocess.min_side

    def prepare(self, item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        """An RGB image as uint8 (3, H, W), or `pixel_values` of that shape as float32.

        Args:
            item: for the fast transform also a `ReducedImage`.
        """
        if isinstance(item, np.ndarray):
            return to_numbers("pixel_values", item, (3, *self.preprocess.input_size))
        return self._transform(item)

    def open_jpeg(self, data: bytes, limits: ImageLimits) -> JpegFile | None:
        return None if self._jpegs is None else self._jpegs.open(data, limits)

    def batch(self, inputs: Sequence[Any], *, pin_memory: bool = False) -> Tensor | JpegBatch:
        if self._jpegs is None or not any(isinstance(item, JpegFile) for item in inputs):
            return super().batch(inputs, pin_memory=pin_memory)
        files = {row: item for row, item in enumerate(inputs) if isinstance(item, JpegFile)}
        rest = {row: item for row, item in enumerate(inputs) if row not in files}
        if rest:
            collated = self.collate(list(rest.values()), pin_memory=pin_memory)
            rest = dict(zip(rest, collated, strict=True))
        return JpegBatch(self._jpegs, files, rest)

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        # decoded images are uint8, pixel_values float; a mixed batch is normalised here
        if len({image.dtype for image in inputs}) > 1:
            normalize = Normalize(self.preprocess)
            inputs = [normalize(image[None])[0] for image in inputs]
        return collate(inputs, pin_memory=pin_memory)

    def blank(self) -> Tensor:
        return torch.zeros(3, *self.preprocess.input_size, dtype=torch.uint8)

    def samples(self, count: int) -> list[Tensor]:
        return [self.prepare(photo) for photo in sample_photos(count)]

    def calibration_inputs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        images = self.placement.calibration
        if images is None or self.modality != "image":
            return super().calibration_inputs()
        sets = (images.calibration, images.held_out)
        calibration, held_out = (
            [self.prepare(image) for image in read_images(files, self.min_side)] for files in sets
        )
        return calibration, held_out
