"""EsViT's ViL (arXiv 2103.15358, 2106.09785, github.com/microsoft/esvit): a Vision Longformer.

Four stages, each of patches, global tokens, and blocks whose attention is full or sliding. Patches
of a sliding stage see the global tokens and the patches of their own window and the eight around
it. Modules have upstream's names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.networks.longformer import FullAttention, SlidingAttention

NORM_EPS = 1e-6


class Embed(nn.Module):
    """Patches of a map behind global tokens, which begin a stage, with positions if it has them."""

    def __init__(
        self, inputs: int, dim: int, *, patch: int, tokens: int, norm: bool, grid: Sequence[int],
    ) -> None:  # fmt: skip
        """
        Args:
            tokens: how many global tokens there are.
            grid: rows and columns of absolute positions; empty for none.
        """
        super().__init__()
        self.proj = nn.Conv2d(inputs, dim, patch, stride=patch)
        self.norm_embed = nn.LayerNorm(dim, eps=NORM_EPS) if norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.zeros(1, tokens, dim)) if tokens else None
        self.has_positions = bool(grid)
        if grid:
            rows, columns = grid
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
            self.x_pos_embed = nn.Parameter(torch.zeros(1, rows, dim // 2))
            self.y_pos_embed = nn.Parameter(torch.zeros(1, columns, dim // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, T, D), global ones first, and the patches' rows and columns."""
        x = self.proj(x)
        rows, columns = x.shape[2:]
        x = self.norm_embed(x.flatten(2).transpose(1, 2))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.has_positions:
            positions = self._positions(x.shape[1])
            x = x + torch.cat([self.cls_pos_embed, positions], 1)
        return x, (rows, columns)

    def _positions(self, tokens: int) -> Tensor:
        """(1, h * w, D) for that many tokens. Upstream counts global tokens as patches when it
        resizes, so that positions are resized even for the size that they were trained at."""
        by_row = self.x_pos_embed[0, :, None].expand(-1, self.y_pos_embed.shape[1], -1)
        by_column = self.y_pos_embed[0, None].expand(self.x_pos_embed.shape[1], -1, -1)
        table = torch.cat([by_row, by_column], -1)
        cells = table.shape[0] * table.shape[1]
        if tokens != cells:
            factor = (tokens / cells) ** 0.5
            resized = interpolate(table.permute(2, 0, 1)[None], scale_factor=factor, mode="bicubic")
            return resized.flatten(2).transpose(1, 2)
        return table.flatten(0, 1)[None]


class AttentionBlock(nn.Module):
    """A norm, attention, and a shortcut."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attention

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        out: Tensor = x + self.attn(self.norm(x), grid)
        return out


class MlpBlock(nn.Module):
    """A norm, two layers, and a shortcut."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = self.act(self.mlp["fc1"](self.norm(x)))
        out: Tensor = x + self.mlp["fc2"](hidden)
        return out


class Vil(nn.Module):
    """EsViT's ViL. Features are the last stage's map (B, D, h, w), normalised; their mean is the
    embedding."""

    def __init__(self, *, stages: Sequence[Mapping[str, Any]], num_classes: int = 0) -> None:
        """
        Args:
            stages: for each one `dim`, `depth`, `heads`, `hidden` (channels of MLPs), `patch`,
                `tokens` (global ones; the last stage has none), `norm` (whether patches are
                normalised), `grid` (of absolute positions; empty for none), `bias` (whether queries
                have one), `sliding`, `window`, and `table` (see the attentions).
        """
        super().__init__()
        self.num_classes, self.num_features = num_classes, int(stages[-1]["dim"])
        self.stages_of = [dict(stage) for stage in stages]
        inputs = 3
        for number, stage in enumerate(stages, 1):
            dim = int(stage["dim"])
            names = ("patch", "tokens", "norm", "grid")
            layers: list[nn.Module] = [Embed(inputs, dim, **{n: stage[n] for n in names})]
            kind = SlidingAttention if stage["sliding"] else FullAttention
            options = {name: stage[name] for name in ("tokens", "bias", "table", "window")}
            for _ in range(int(stage["depth"])):
                layers.append(AttentionBlock(dim, kind(dim, int(stage["heads"]), **options)))
                layers.append(MlpBlock(dim, int(stage["hidden"])))
            self.add_module(f"layer{number}", nn.ModuleList(layers))
            inputs = dim
        self.norm = nn.LayerNorm(inputs, eps=NORM_EPS)
        self.head = nn.Linear(inputs, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def check_size(self, height: int, width: int) -> str | None:
        """Why a size is not taken: positions, and the biases of full attention with global tokens,
        are of squares."""
        stride = 1
        for stage in self.stages_of:
            stride *= int(stage["patch"])
            rows, columns = height // stride, width // stride
            if not rows or not columns:
                return f"it takes {stride} pixels a side and more"
            full = stage["table"] and stage["tokens"] and not stage["sliding"]
            if (stage["grid"] or full) and rows != columns:
                return "it takes squares alone"
        return None

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to a map (B, D, h, w)."""
        for number in range(1, len(self.stages_of) + 1):
            outputs, grid, tokens = self._stage(number, x)
            x = _to_map(outputs[-1][:, tokens:], grid)
        return _to_map(self.norm(outputs[-1]), grid)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean of a map, or logits (B, K)."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def block_means(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Each block's output (B, D): the first global token, or the mean of the patches, of the
        last stage's after the norm."""
        means, x = [], pixels_BCHW
        for number in range(1, len(self.stages_of) + 1):
            outputs, grid, tokens = self._stage(number, x)
            x = _to_map(outputs[-1][:, tokens:], grid)
            last = number == len(self.stages_of)
            for out in outputs:
                normed = self.norm(out) if last else out
                means.append(normed[:, 0] if tokens else normed.mean(1))
        return means

    def _stage(self, number: int, x: Tensor) -> tuple[list[Tensor], tuple[int, int], int]:
        """Each block's output (B, T, D), the patches' grid, and how many tokens are global."""
        layers: Any = self.get_submodule(f"layer{number}")
        x, grid = layers[0](x)
        outputs = []
        for layer in list(layers)[1:]:
            x = layer(x, grid)
            if isinstance(layer, MlpBlock):
                outputs.append(x)
        return outputs, grid, int(self.stages_of[number - 1]["tokens"])


def _to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.unflatten(x.transpose(1, 2), 2, grid)


NETWORKS = {"vil": Vil}
