"""What a trunk returns for a batch.

Shape suffixes: B batch, C channels, H W pixels, h w grid cells, T tokens, D embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from models.trunks.query_tokens import QueryOutputs
from models.trunks.transfers import index_tensor


@dataclass(frozen=True, slots=True)
class TrunkOutput:
    """The output of one pass, before any head.

    Args:
        features: the backbone's own last output, which its pooling and its classifier take:
            (B, T, D) for token models, else (B, C, h, w), or (B, h, w, C) if `channels_last`.
        prefix: the number of class and register tokens before the patch tokens.
        grid: (h, w), the patches' rows and columns.
        channels_last: whether a feature map has its channels last (Swin).
        layers: outputs of blocks by index, (B, T, D), before the final norm; of a hierarchical
            network those of stages, (B, C, h, w).
        attention: attention probabilities of blocks by index, (B, heads, T, T).
        cls_attention: the first token's row of those alone, (B, heads, T).
        keys_values: keys and values of every block, (B, heads, T, d) each.
        queries: for each head's query tokens their outputs, for the rows that requested them.
        pixels: the normalised input (B, 3, H, W).
        dense: an embedding of every patch (B, D, h, w), of a CLIP.
        tower_tokens: all tokens (B, T, W) of a tower whose `features` are its embedding, or its
            feature map (B, W, h, w).

    Fields from `layers` on are filled only if the pass was requested to yield them.
    """

    features: Tensor
    prefix: int
    grid: tuple[int, int]
    channels_last: bool = False
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    cls_attention: Mapping[int, Tensor] = field(default_factory=dict)
    keys_values: Sequence[tuple[Tensor, Tensor]] = ()
    queries: QueryOutputs = field(default_factory=QueryOutputs)
    pixels: Tensor | None = None
    dense: Tensor | None = None
    tower_tokens: Tensor | None = None

    @property
    def tokens_BTD(self) -> Tensor:
        """All tokens, class and register tokens first. A feature map's cells row by row."""
        if self.features.dim() == 3:
            return self.features
        return self.feature_map_BChw.flatten(2).transpose(1, 2)

    @property
    def patches_BTD(self) -> Tensor:
        """The patch tokens."""
        return self.tokens_BTD[:, self.prefix :]

    @property
    def feature_map_BChw(self) -> Tensor:
        """The patch features as a map."""
        if self.features.dim() == 4:
            return self.features.permute(0, 3, 1, 2) if self.channels_last else self.features
        return self.patches_BTD.transpose(1, 2).reshape(*self.features.shape[::2], *self.grid)

    def rows(self, index: Sequence[int]) -> "TrunkOutput":
        """The output for some rows of the batch, in the order of `index`.

        `queries` are unchanged, since they are by head already.
        """
        if list(index) == list(range(self.features.shape[0])):
            return self
        rows = index_tensor(list(index), self.features.device)
        return replace(
            self,
            features=self.features[rows],
            layers={number: layer[rows] for number, layer in self.layers.items()},
            attention={number: maps[rows] for number, maps in self.attention.items()},
            cls_attention={number: maps[rows] for number, maps in self.cls_attention.items()},
            keys_values=[(keys[rows], values[rows]) for keys, values in self.keys_values],
            pixels=None if self.pixels is None else self.pixels[rows],
            dense=None if self.dense is None else self.dense[rows],
            tower_tokens=None if self.tower_tokens is None else self.tower_tokens[rows],
        )


def by_number(tensors: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """The tensors `name.N` by N."""
    return {
        int(key.partition(".")[2]): tensor
        for key, tensor in tensors.items()
        if key.partition(".")[0] == name
    }
