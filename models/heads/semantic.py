"""Semantic segmentation by a trained decoder on some of the trunk's blocks or stages."""

from collections.abc import Mapping, Sequence
from operator import ge
from typing import Any, Self

import torch
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import check_strictly, load_strictly
from models.errors import CheckpointError, InputError
from models.heads.segment import Segment
from models.networks.dpt import with_class_token
from models.reference_outputs import Parts, image_outputs
from models.segmentation.decoders import class_count, create_decoder
from models.segmentation.decoders.layers import resize
from models.segmentation.label_sets import label_sets, load_label_set
from models.segmentation.windows import Windows, sliding_logits
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest, merge
from models.trunks.output import TrunkOutput

MAX_CLASSES = 1000
MAX_LAYERS = 256
DECODER = "the decoder"


class Semantic(Segment):
    """Settings:
        layers: blocks (of a ViT) or stages (of a hierarchical trunk) that the decoder reads,
            counted from 0 or back from -1.
        normed: whether they pass through the trunk's final norm: all, none, or a list of those.
        class_tokens: whether maps have the class token's channels behind each patch's (false).
        windows: the fields of `Windows`, if images are cut into windows instead of being resized
            by the trunk's transform.
        run_whole: whether `Model.run` takes an input whole, where servers cut windows. Logits are
            then resized to the input with its padding to whole patches, which is cut off.
        labels, palette: class names, or the name of a label set, and colours.
        Others: see `create_decoder`.

    Tensors: see `create_decoder`.
    """

    kind = "semantic"
    needs_state = True
    is_main = True
    is_portable = True

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
        depth = trunk.layer_count
        layers = [int(n) for n in settings["layers"][: MAX_LAYERS + 1]]
        if not 1 <= len(layers) <= MAX_LAYERS or any(not -depth <= n < depth for n in layers):
            raise CheckpointError(f"the decoder reads layers {layers}; the trunk has {depth}")
        self.layers = [n % depth for n in layers]
        self.request = FeatureRequest(layers=frozenset(self.layers))
        normed = settings.get("normed", False)
        normed = normed if isinstance(normed, list | tuple) else self.layers if normed else []
        self.normed = frozenset(int(n) % depth for n in normed)
        self.run_whole = bool(settings.get("run_whole", False))
        self.class_tokens = bool(settings.get("class_tokens", False))
        if self.class_tokens and not trunk.num_prefix_tokens:
            raise CheckpointError("the decoder reads class tokens, which the trunk does not have")
        try:
            # Without memory first: the settings are believed once the shapes agree with the file.
            with torch.device("meta"):
                check_strictly(create_decoder(state.tensors, settings), state.tensors, DECODER)
            decoder = create_decoder(state.tensors, settings)
            classes = class_count(state.tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the decoder is incomplete: {error}") from error
        load_strictly(decoder, state.tensors, DECODER)
        if classes > MAX_CLASSES:
            raise CheckpointError(f"{classes} classes; the limit is {MAX_CLASSES}")
        if len(self.labels) != classes:
            raise CheckpointError(f"{len(self.labels)} labels for {classes} classes")
        self.network = trunk.placement.apply(decoder)
        if (windows := settings.get("windows")) is not None:
            fields: dict[str, Any] = {
                "fill": tuple(round(value * 255) for value in trunk.preprocess.mean),
                **{k: tuple(v) if isinstance(v, list) else v for k, v in windows.items()},
            }
            try:
                self.view = Windows(**fields)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"invalid window settings: {error}") from error

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        assert state is not None
        return cls(trunk, labels, state)

    def maps(self, output: TrunkOutput) -> list[Tensor]:
        """The layers that the decoder reads, (B, C, h, w)."""
        layers = [
            self.trunk.norm(output.layers[n]) if n in self.normed else output.layers[n]
            for n in self.layers
        ]
        maps = [
            layer if layer.dim() == 4 else tokens_to_map(layer[:, output.prefix :], output.grid)
            for layer in layers
        ]
        if not self.class_tokens:
            return maps
        return [with_class_token(x, layer[:, 0]) for x, layer in zip(maps, layers, strict=True)]

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`logits` (B, K, h, w)."""
        return {"logits": self.network(self.maps(output))}

    def reference_outputs(self, parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By mmsegmentation's names: `mask_logits` (B, K, H, W) and `segmentation` (B, H, W), the
        best classes. For an input that is larger than a window, the logits are merged from
        windows. Otherwise `mask_logits_lowres` and the trunk's own outputs come with them."""
        pixels = inputs["pixel_values"]
        windows: Any = None if self.run_whole else self.view
        if windows is not None and windows.crop not in (None, tuple(pixels.shape[2:])):
            if windows.pads and not all(map(ge, pixels.shape[2:], windows.crop)):
                raise InputError(
                    f"pixel_values are {tuple(pixels.shape[2:])}; this model's windows are "
                    f"{windows.crop} and no smaller",
                    field="pixel_values",
                )
            logits = sliding_logits(pixels, windows, self._logits)
            return {"mask_logits": logits, "segmentation": logits.argmax(1)}
        lowres = self._logits(pixels)
        height, width = pixels.shape[2:]
        padded = (height, width)
        if self.run_whole:
            rows, columns = self.trunk.patch_size
            padded = (height + -height % rows, width + -width % columns)
        logits = resize(lowres, padded)[..., :height, :width]
        return image_outputs(parts, inputs) | {
            "mask_logits": logits,
            "mask_logits_lowres": lowres,
            "segmentation": logits.argmax(1),
        }

    def _logits(self, pixels: Tensor) -> Tensor:
        request = merge([(self.request, range(len(pixels)))])
        return self.forward(self.trunk.forward(pixels, request))["logits"]


def _checked(palette: Any, count: int) -> Any:
    """A palette that has a colour for each class, or None."""
    if palette is None:
        return None
    if not isinstance(palette, list | tuple):
        raise CheckpointError("the palette must be a list of colours")
    colours = [
        tuple(colour) for colour in palette if isinstance(colour, list | tuple) and len(colour) == 3
    ]
    values = [value for colour in colours for value in colour]
    if len(colours) != count or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
        raise CheckpointError(f"the palette must have {count} colours of 3 values from 0 to 255")
    return colours


def tokens_to_map(tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, h, w) of patch tokens, row by row."""
    return torch.unflatten(tokens_BND.transpose(1, 2), 2, grid)
