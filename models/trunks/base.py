"""Trunks: a backbone with its weights, what is shared between models and what gets batched.

Shape suffixes: B batch, C channels, H W pixels, h w grid cells, T tokens, D embedding.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.inputs.transforms import Preprocess, collate, normalize
from models.trunks.features import NOTHING, Need, Queries
from models.trunks.hooks import BlockReader
from models.trunks.pooling import ggem


@dataclass(frozen=True, slots=True)
class TrunkOutput:
    """What one trunk pass yields for a batch, before any head.

    `features` is the backbone's own last output, which its own pooling and classifier want:
    (B, T, D) for token models, else (B, C, h, w), or (B, h, w, C) if `channels_last` (Swin).
    `prefix` counts the class and register tokens before the patches; `grid` is (h, w). The rest
    is there where it was needed: blocks' outputs by number, (B, T, D), before the final norm, or
    stages', (B, C, h, w); blocks' attention probabilities (B, h, T, T), or in `looks` those of the
    first token, (B, h, T); each block's keys and values, (rows, h, T, d), of `keys_values_rows`;
    for each head's queries (rows, L, T, D), of those it answers for; the normalised `pixels`
    (B, 3, H, W); and the patches' embeddings, `dense` (B, D, h, w).
    """

    features: Tensor
    prefix: int
    grid: tuple[int, int]
    channels_last: bool = False
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    looks: Mapping[int, Tensor] = field(default_factory=dict)
    keys_values: Sequence[tuple[Tensor, Tensor]] = ()
    keys_values_rows: tuple[int, ...] = ()
    queries: Mapping[Queries, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None
    dense: Tensor | None = None

    @property
    def tokens_BTD(self) -> Tensor:
        """All tokens, prefix first; a feature map's cells row by row."""
        if self.features.dim() == 3:
            return self.features
        return self.feature_map_BChw.flatten(2).transpose(1, 2)

    @property
    def patches_BTD(self) -> Tensor:
        """The tokens that stand for places in the image."""
        return self.tokens_BTD[:, self.prefix :]

    @property
    def feature_map_BChw(self) -> Tensor:
        """The same features laid out in the image's plane."""
        if self.features.dim() == 4:
            return self.features.permute(0, 3, 1, 2) if self.channels_last else self.features
        return self.patches_BTD.transpose(1, 2).reshape(*self.features.shape[::2], *self.grid)

    def rows(self, index: list[int]) -> "TrunkOutput":
        """The output for some of the batch's images, in the order of `index`; queries are by
        head already."""
        if index == list(range(self.features.shape[0])):
            return self
        places = [self.keys_values_rows.index(i) for i in index if i in self.keys_values_rows]
        return replace(
            self,
            features=self.features[index],
            layers={number: layer[index] for number, layer in self.layers.items()},
            attention={number: map_[index] for number, map_ in self.attention.items()},
            looks={number: map_[index] for number, map_ in self.looks.items()},
            keys_values=[(keys[places], values[places]) for keys, values in self.keys_values],
            keys_values_rows=tuple(range(len(places))),
            pixels=None if self.pixels is None else self.pixels[index],
            dense=None if self.dense is None else self.dense[index],
        )


class InputSpec(Protocol):
    """How inputs are prepared for a trunk: a dataclass, equal digests meaning equal tensors."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides what tensor an input becomes."""


class Trunk(Protocol):
    """A backbone that several models may share.

    `modality` is `image` or `text`; `has_tokens` is False where `forward` yields nothing but the
    pooled embedding; `exponents` (G,) are those of a pooling by group generalized mean, or None;
    `blocks` are those that heads can read and have queries ride along, none where they cannot;
    `layered` those whose outputs they can read, or stages, which other networks have, too.
    """

    architecture: str
    modality: str
    placement: "Placement"
    digest: str
    network: nn.Module
    has_tokens: bool
    exponents: Any
    blocks: Sequence[Any]
    layered: Sequence[Any]

    @property
    def preprocess(self) -> Any:
        """The InputSpec: a `Preprocess` for images."""

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        """Prepared inputs as the batch that `forward` takes."""

    def blank(self) -> Tensor:
        """An input that stands for none: enough to prove that the trunk computes."""

    def forward(self, batch: Tensor, need: Need = NOTHING) -> TrunkOutput:
        """Run the backbone on a batch: for images uint8 pixels (B, 3, H, W), or float pixels
        already normalised; for texts token ids (B, T). Trunks with `blocks` also yield what is
        needed of those."""

    def norm(self, layer_BTD: Tensor) -> Tensor:
        """A block's output as the final norm would leave it."""

    def pool(self, output: TrunkOutput) -> Tensor:
        """(B, D): the backbone's own pooled representation, before any classifier."""

    def classify(self, output: TrunkOutput) -> Tensor:
        """(B, K) logits of the classifier that came with the checkpoint."""

    @property
    def num_classes(self) -> int:
        """Classes of that classifier; 0 where the checkpoint has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a trunk computes. `channels_last` is the layout convolutions prefer on CPUs."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def apply(self, network: nn.Module) -> nn.Module:
        """Move a network here and freeze it for inference."""
        network = network.eval().requires_grad_(False).to(self.device, self.dtype)
        return network.to(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self, pixels_BCHW: Tensor, preprocess: Preprocess) -> Tensor:
        """A batch of pixels, uint8 or normalised, as the network wants it and where."""
        pixels_BCHW = normalize(pixels_BCHW.to(self.device, non_blocking=True), preprocess)
        return pixels_BCHW.to(self.dtype, memory_format=self.memory_format)


class ClosedTrunk:
    """What trunks share that yield one embedding or image, and whose insides no head reads."""

    num_classes = 0
    has_tokens = False
    exponents: Tensor | None = None
    blocks: Sequence[Any] = ()
    layered: Sequence[Any] = ()

    def norm(self, layer_BTD: Tensor) -> Tensor:
        raise NotImplementedError("its blocks are not read")

    def classify(self, output: TrunkOutput) -> Tensor:
        raise NotImplementedError("it has no classifier")


class ImageTrunk:
    """What image trunks share: how prepared images become a batch."""

    modality = "image"
    exponents: Tensor | None = None
    preprocess: Preprocess

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        # decoded images are uint8, those that came preprocessed are not; together, none are
        if len({image_CHW.dtype for image_CHW in inputs}) > 1:
            inputs = [normalize(image_CHW[None], self.preprocess)[0] for image_CHW in inputs]
        return collate(inputs, pin_memory=pin_memory)

    def blank(self) -> Tensor:
        return torch.zeros(3, *self.preprocess.input_size, dtype=torch.uint8)


class TimmTrunk(ImageTrunk):
    """A timm network with its classifier still attached, if it has one."""

    has_tokens = True

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Preprocess, placement: Placement
    ) -> None:
        self.architecture = architecture
        self.preprocess = preprocess
        self.digest = state_digest(network.state_dict())
        self.network: Any = placement.apply(network)
        self.placement = placement
        self._reader = BlockReader(network)
        self.blocks: Sequence[Any] = self._reader.blocks
        self.layered: Sequence[Any] = self._reader.layered

    def forward(self, pixels_BCHW: Tensor, need: Need = NOTHING) -> TrunkOutput:
        pixels_BCHW = self.placement.prepare(pixels_BCHW, self.preprocess)
        if need == NOTHING:
            return self._output(self.network.forward_features(pixels_BCHW), pixels_BCHW)
        if not need.features:
            nothing = pixels_BCHW.new_empty(len(pixels_BCHW), 0, 0)
            return TrunkOutput(nothing, 0, self._grid(pixels_BCHW), pixels=pixels_BCHW)
        with self._reader.reading(need) as reading:
            features = self.network.forward_features(pixels_BCHW)
        return replace(
            self._output(features, pixels_BCHW),
            layers=reading.layers,
            attention=reading.attention,
            looks=reading.looks,
            keys_values=reading.keys_values,
            keys_values_rows=need.keys_values,
            queries=reading.queries(),
            pixels=pixels_BCHW if need.pixels else None,
        )

    def _output(self, features: Tensor, pixels_BCHW: Tensor) -> TrunkOutput:
        if features.dim() == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            rows, columns = features.shape[1:3] if channels_last else features.shape[2:]
            return TrunkOutput(features, 0, (rows, columns), channels_last)
        prefix = int(getattr(self.network, "num_prefix_tokens", 0))
        return TrunkOutput(features, prefix, self._grid(pixels_BCHW))

    def norm(self, layer_BTD: Tensor) -> Tensor:
        normed: Tensor = self.network.norm(layer_BTD)
        return normed

    def pool(self, output: TrunkOutput) -> Tensor:
        if self.exponents is not None:
            return ggem(output.patches_BTD, self.exponents)
        pooled: Tensor = self.network.forward_head(output.features, pre_logits=True)
        return pooled

    def classify(self, output: TrunkOutput) -> Tensor:
        logits: Tensor
        if self.exponents is not None:
            logits = self.network.head(self.pool(output).to(self.placement.dtype))
        else:
            logits = self.network.forward_head(output.features)
        return logits

    @property
    def num_classes(self) -> int:
        return int(self.network.num_classes)

    def _grid(self, pixels_BCHW: Tensor) -> tuple[int, int]:
        height, width = pixels_BCHW.shape[-2:]
        patch_embed = getattr(self.network, "patch_embed", None)
        rows, columns = getattr(patch_embed, "patch_size", (height, width))
        return height // rows, width // columns


def state_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of all weights: the same however they were stored."""
    digest = hashlib.sha256()
    for key, value in sorted(state_dict.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()


def parameter_bytes(network: nn.Module) -> int:
    """Bytes that a network's parameters and buffers take on their device."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
