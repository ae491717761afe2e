"""Masked autoencoders' own task: predict all patches from some of them.

MAE (arXiv 2111.06377), SupMAE, SdMAE; Scale-MAE (arXiv 2212.14532) predicts at twice the size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError, InputError
from models.heads.base import Head
from models.heads.generate import encode_png, to_pixels
from models.networks.masked import (
    MaskedDecoder,
    Visible,
    patch_statistics,
    patchify,
    unpatchify,
)
from models.networks.scale_decoder import Drawn, ScaleDecoder
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest
from models.trunks.masked import MaskedTrunk
from models.trunks.output import TrunkOutput
from models.trunks.transfers import to_device

PATCH_CHANNELS = 3


class Reconstruct(Head):
    """Settings:
    num_heads: attention heads of the decoder.
    mask_ratio: the share of patches hidden in training.
    by_patch: whether it predicts patches scaled to mean 0 and variance 1 each.
    band: see `ScaleDecoder`.
    """

    kind = "reconstruct"
    task = "reconstruct"
    state_name = "decoder"
    needs_state = True
    request = FeatureRequest(pixels=True, features=False)
    forward_options = frozenset({"mask_ratio", "seed"})
    forward_is_slow = True
    finish_is_slow = True

    def __init__(self, trunk: Trunk, state: HeadState) -> None:
        """
        Raises:
            CheckpointError: the decoder's weights do not match, or the trunk cannot encode some
                patches alone.
        """
        if not isinstance(trunk, MaskedTrunk):
            raise CheckpointError(f"{trunk.architecture} is not a masked autoencoder's encoder")
        self.trunk = trunk
        self.mask_ratio = float(state.settings.get("mask_ratio", 0.75))
        self.by_patch = bool(state.settings.get("by_patch", False))
        self.network = trunk.placement.apply(create_decoder(state))
        spec, placement = trunk.preprocess, trunk.placement
        self._mean, self._std = (
            torch.tensor(values).view(3, 1, 1).to(placement.device, placement.dtype)
            for values in (spec.mean, spec.std)
        )

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        assert state is not None
        return cls(trunk, state)

    @classmethod
    def comes_with(cls, trunk: Trunk, states: Mapping[str, HeadState]) -> bool:
        return cls.state_name in states

    def check(self, options: Mapping[str, Any]) -> None:
        ratio = options.get("mask_ratio", self.mask_ratio)
        height, width = self.trunk.preprocess.input_size
        rows, columns = self.trunk.patch_size
        count = (height // rows) * (width // columns)
        if not 1 <= int(count * (1 - ratio)) < count:
            raise InputError(
                f"mask_ratio is {ratio}; of {count} patches at least one must be hidden, and one "
                "visible",
                field="mask_ratio",
            )

    def forward(
        self, output: TrunkOutput, *, mask_ratio: float | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """`drawn` (B, 3, h, w) within 0..1: all patches as predicted; `pasted`: the same with the
        visible patches as they were; `seen` (B, 3, H, W), grey where hidden; `mask`
        (B, rows, columns), 1 where hidden."""
        pixels = output.pixels
        assert pixels is not None
        count = output.grid[0] * output.grid[1]
        noise = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        noise = to_device(noise.to(pixels.dtype), pixels.device)
        visible = self.encode(pixels, noise.expand(len(pixels), -1), mask_ratio)
        images, drawn = self._scale(pixels), self._scale(self.draw(visible, pixels))
        hidden = visible.mask.reshape(-1, 1, *output.grid)
        large = interpolate(images, size=drawn.shape[-2:], mode="bilinear", align_corners=False)
        pasted = torch.where(interpolate(hidden, size=drawn.shape[-2:]) > 0, drawn, large)
        seen = torch.where(interpolate(hidden, size=images.shape[-2:]) > 0, 0.5, images)
        return {"drawn": drawn, "pasted": pasted, "seen": seen, "mask": hidden[:, 0]}

    def encode(
        self, pixels: Tensor, noise_BN: Tensor, ratio: float | None, scale: Tensor | None = None
    ) -> Visible:
        """Encode the patches with the least noise; a `ratio` of None is the one of training.
        `scale` (B,) is Scale-MAE's `input_res`, None for 1."""
        ratio = self.mask_ratio if ratio is None else ratio
        return self.trunk.encode_visible(pixels, noise_BN, ratio, scale)

    def draw_scales(self, visible: Visible, scale: Tensor | None = None) -> Drawn:
        """Scale-MAE's predictions; `scale` as for `encode`."""
        drawn: Drawn = self.network(visible, self.trunk.scales(scale, visible.latent))
        return drawn

    def draw(self, visible: Visible, pixels: Tensor) -> Tensor:
        """The predicted images (B, 3, h, w), normalised as the input is."""
        if isinstance(self.network, ScaleDecoder):
            return self.draw_scales(visible).combined
        patches = self.network(visible)
        side = round((patches.shape[-1] / PATCH_CHANNELS) ** 0.5)
        if self.by_patch:
            mean, deviation = patch_statistics(patchify(pixels, side))
            patches = patches * deviation + mean
        return unpatchify(patches, side, (pixels.shape[2], pixels.shape[3]))

    def _scale(self, pixels: Tensor) -> Tensor:
        """Normalised pixels to 0..1."""
        return (pixels * self._std + self._mean).clamp(0, 1)

    def finish(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`size` (2,) width and height of the PNGs `drawn` and `pasted`; `seen` is a PNG of the
        input's size; `mask` (rows, columns) uint8, 1 where hidden."""
        images = {
            name: Image.fromarray(to_pixels(row[name])) for name in ("drawn", "pasted", "seen")
        }
        return {
            "size": np.array(images["drawn"].size),
            **{name: encode_png(image) for name, image in images.items()},
            "mask": row["mask"].astype(np.uint8),
        }


def create_decoder(state: HeadState) -> nn.Module:
    """The decoder with its weights.

    Raises:
        CheckpointError: the weights do not match.
    """
    tensors = state.tensors
    dim, width = tensors["decoder_embed.weight"].shape
    depth = len({k.split(".")[1] for k in tensors if k.startswith("decoder_blocks.")})
    heads = int(state.settings["num_heads"])
    decoder: nn.Module
    if "fpn.fpn2.0.weight" in tensors:
        shared = "fcn.proj.weight" in tensors
        fcn = "fcn." if shared else "fcn_high."
        blocks = f"{fcn}conv_blocks."
        decoder = ScaleDecoder(
            width=width,
            dim=dim,
            depth=depth,
            heads=heads,
            fcn_dim=tensors[f"{fcn}proj.weight"].shape[0],
            fcn_layers=len({k.split(".")[2] for k in tensors if k.startswith(blocks)}),
            shared=shared,
            progressive="fpn.fpn1.0.ln.weight" in tensors,
            band=int(state.settings["band"]),
        )
    else:
        decoder = MaskedDecoder(
            width,
            dim,
            depth,
            heads,
            tensors["decoder_pos_embed"].shape[1] - 1,
            tensors["decoder_pred.weight"].shape[0],
        )
    load_strictly(decoder, tensors, "the decoder")
    return decoder
