"""Semantic segmentation by a trained decoder on some of the trunk's blocks or stages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError
from models.heads.segment import Segment
from models.segmentation.decoders import create_decoder, resize
from models.segmentation.label_sets import label_sets, load_label_set
from models.segmentation.windows import Windows, sliding_logits
from models.trunks.base import Trunk, TrunkOutput
from models.trunks.features import Need

MAX_CLASSES = 1000


class Semantic(Segment):
    """Settings: `layers`, which blocks (of a ViT) or stages (of a hierarchical trunk) the decoder
    reads, counted from 0, or back from -1; `normed`, whether through the trunk's final norm;
    `windows`, the fields of `Windows`, if images are not to be resized as the trunk does; `labels`
    and `palette`; and what `create_decoder` takes.

    Tensors: as `create_decoder` reads them.
    """

    def __init__(self, trunk: Trunk, labels: Sequence[str], state: HeadState) -> None:
        """
        Raises:
            CheckpointError: the trunk has no such layers, or the weights do not fit.
        """
        settings = state.settings
        names, palette = labels or settings.get("labels", ()), settings.get("palette")
        if isinstance(names, str):
            if names not in label_sets():
                raise CheckpointError(f"no label set {names!r}")
            names, palette = load_label_set(names)
        super().__init__(trunk, names, None if labels else _checked(palette, len(names)))
        depth = len(trunk.layered)
        given = [int(n) for n in settings["layers"]]
        if not given or any(not -depth <= n < depth for n in given):
            raise CheckpointError(f"the decoder reads layers {given}; the trunk has {depth}")
        self.layers = [n % depth for n in given]
        self.normed = bool(settings.get("normed", False))
        try:
            decoder = create_decoder(state.tensors, settings)
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(f"no whole decoder, for want of {error}") from error
        load_strictly(decoder, state.tensors, "the decoder")
        classes = state.tensors["decode_head.conv_seg.weight"].shape[0]
        if classes > MAX_CLASSES:
            raise CheckpointError(f"{classes} classes; there can be {MAX_CLASSES}")
        if len(self.labels) != classes:
            raise CheckpointError(f"{len(self.labels)} labels for {classes} classes")
        self.network = trunk.placement.apply(decoder)
        if (windows := settings.get("windows")) is not None:
            fields: dict[str, Any] = {
                "fill": tuple(round(value * 255) for value in trunk.preprocess.mean),
                **{k: tuple(v) if isinstance(v, list) else v for k, v in windows.items()},
            }
            try:
                self.view: Any = Windows(**fields)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"the head's windows are none: {error}") from error

    def needs(self, rows: Sequence[int]) -> Need:
        return Need(layers=frozenset(self.layers))

    def maps(self, output: TrunkOutput) -> list[Tensor]:
        """The layers that the decoder reads, (B, C, h, w)."""
        found = [output.layers[n] for n in self.layers]
        if self.normed:
            found = [self.trunk.norm(layer) for layer in found]
        return [
            layer if layer.dim() == 4 else tokens_to_map(layer[:, output.prefix :], output.grid)
            for layer in found
        ]

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`logits` (B, K, h, w)."""
        return {"logits": self.network(self.maps(output))}

    def wants_windows(self, pixels: Tensor) -> bool:
        """Whether an input is larger than the one window that the trunk takes."""
        crop = None if self.view is None else self.view.crop
        return crop is not None and tuple(pixels.shape[2:]) != tuple(crop)

    def run(self, pixels: Tensor) -> dict[str, Tensor]:
        """By mmsegmentation's names: `mask_logits` (B, K, H, W), of windows put together where the
        input is larger than one; `mask_logits_lowres`, else, as the decoder gives them; and
        `segmentation` (B, H, W), the best classes."""
        size = pixels.shape[2:]
        if self.wants_windows(pixels):
            logits = sliding_logits(pixels, self.view, self._logits)
            return {"mask_logits": logits, "segmentation": logits.argmax(1)}
        lowres = self._logits(pixels)
        logits = resize(lowres, size)
        return {
            "mask_logits": logits,
            "mask_logits_lowres": lowres,
            "segmentation": logits.argmax(1),
        }

    def _logits(self, pixels: Tensor) -> Tensor:
        output = self.trunk.forward(pixels, self.needs(range(len(pixels))))
        return self.forward(output)["logits"]


def _checked(palette: Any, count: int) -> Any:
    """A palette that has a colour for each class, or None."""
    if palette is None:
        return None
    if not isinstance(palette, list | tuple):
        raise CheckpointError("the palette is no list of colours")
    colours = [
        tuple(colour) for colour in palette if isinstance(colour, list | tuple) and len(colour) == 3
    ]
    values = [value for colour in colours for value in colour]
    if len(colours) != count or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
        raise CheckpointError(f"the palette is none of {count} colours")
    return colours


def tokens_to_map(tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, h, w) of patch tokens, row by row."""
    return torch.unflatten(tokens_BND.transpose(1, 2), 2, grid)
