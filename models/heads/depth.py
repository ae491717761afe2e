"""Depth by a trained decoder on some of a plain ViT's blocks."""

from collections.abc import Mapping, Sequence
from typing import Self

import cv2
import numpy as np
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError
from models.heads.base import Head
from models.heads.segment import reduced
from models.heads.semantic import tokens_to_map
from models.networks.depth_decoders import create_depth_decoder
from models.networks.dpt import with_class_token
from models.reference_outputs import Parts
from models.segmentation.decoders.layers import resize
from models.segmentation.windows import Windows
from models.tasks.rendering import npy
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest, merge
from models.trunks.output import TrunkOutput

LEVELS = 65535


class Depth(Head):
    """Settings:
        layers: blocks that the decoder reads, counted from 0, before the final norm.
        scale: pixels that an image is resized to fit in, (longer, shorter).
        Others: see `create_depth_decoder`.

    Tensors: the decoder's.
    """

    kind = "depth"
    task = "depth"
    needs_state = True
    is_main = True
    forward_is_slow = True
    finish_is_slow = True

    def __init__(self, trunk: Trunk, state: HeadState) -> None:
        """
        Raises:
            CheckpointError: the trunk has no such blocks, or the weights do not fit.
        """
        self.trunk = trunk
        self.layers = [int(n) for n in state.settings["layers"]]
        if not trunk.num_prefix_tokens or max(self.layers) >= trunk.layer_count:
            raise CheckpointError(f"the decoder reads blocks {self.layers} and their class tokens")
        self.request = FeatureRequest(layers=frozenset(self.layers))
        try:
            decoder = create_depth_decoder(state.tensors, state.settings)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"the decoder is incomplete: {error}") from error
        load_strictly(decoder, state.tensors, "the decoder")
        self.network = trunk.placement.apply(decoder)
        longer, shorter = state.settings["scale"]
        self.view = Windows(scale=(int(longer), int(shorter)), min_side=max(trunk.patch_size))

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        assert state is not None
        return cls(trunk, state)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`depth` (B, 1, h, w) in metres."""
        layers = [output.layers[n] for n in self.layers]
        levels = [
            with_class_token(tokens_to_map(layer[:, output.prefix :], output.grid), layer[:, 0])
            for layer in layers
        ]
        return {"depth": self.network(levels)}

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], *, output: str = "png"
    ) -> dict[str, np.ndarray]:
        """`size` (2,) width and height; `range` (2,) the least and the largest depth in metres; and
        the image's depth as the option `output`: `png`, 16 bits from the least to the largest, or
        `npy`, float32 (H, W), both sides halved until it has 16 MiB at most."""
        depth_HW = cv2.resize(row["depth"][0], size, interpolation=cv2.INTER_LINEAR)
        least, largest = float(depth_HW.min()), float(depth_HW.max())
        named = {"size": np.array(size), "range": np.array([least, largest], np.float32)}
        if output == "npy":
            return named | {"npy": npy(reduced(depth_HW[None])[0].astype("<f4"))}
        shares = (depth_HW - least) / max(largest - least, np.finfo(np.float32).tiny)
        _, encoded = cv2.imencode(".png", (shares * LEVELS + 0.5).astype(np.uint16))
        return named | {"png": encoded.ravel()}

    def reference_outputs(self, parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`depth` (B, 1, H, W) in metres."""
        pixels = inputs["pixel_values"]
        request = merge([(self.request, range(len(pixels)))])
        depth = self.forward(self.trunk.forward(pixels, request))["depth"]
        return {"depth": resize(depth, pixels.shape[2:])}
