"""timm's BEiT (arXiv 2106.08254) with the authors' way of resizing absolute positions."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import beit
from torch import Tensor, nn
from torch.nn.functional import linear

from models.checkpoints.strict import load_strictly
from models.networks.vit import dino_rule


class Beit(beit.Beit):  # type: ignore[misc]
    """timm's BEiT for inputs of other sizes, if it has no tables of relative positions.

    Upstream resizes its absolute positions by DINO's rule. Relative ones are for one size.
    """

    def __init__(self, *, norm_eps: float = 1e-6, **arguments: Any) -> None:
        """
        Args:
            norm_eps: epsilon of every layer norm.
        """
        super().__init__(norm_layer=partial(nn.LayerNorm, eps=norm_eps), **arguments)
        tables = [block.attn.relative_position_bias_table for block in self.blocks]
        self._is_fixed = self.rel_pos_bias is not None or tables[0] is not None
        self.patch_embed.strict_img_size = self._is_fixed

    def check_size(self, height: int, width: int) -> str | None:
        """What is wrong with inputs of that size, or None."""
        stored = self.patch_embed.img_size
        if self._is_fixed and (height, width) != stored:
            return f"its relative positions are for {stored[0]}x{stored[1]} pixels alone"
        return None

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The table (1, T, D) for a grid of (h, w) cells, class token first; None without one."""
        table: Tensor | None = self.pos_embed
        stored: tuple[int, int] = self.patch_embed.grid_size
        if table is None or grid == stored:
            return table
        first = self.num_prefix_tokens
        cells = torch.unflatten(table[:, first:], 1, stored).permute(0, 3, 1, 2)
        resized = dino_rule(cells, grid)
        return torch.cat([table[:, :first], resized.flatten(2).transpose(1, 2)], 1)

    def prefix_tokens(self) -> Tensor:
        """The tokens (1, P, D) before the patches."""
        token: Tensor = self.cls_token
        return token

    def embed(self, pixels_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches (B, N, D) without positions, and their grid. Pixels beyond the last whole patch
        are ignored, as a convolution does."""
        rows, columns = self.patch_embed.patch_size
        grid = pixels_BCHW.shape[2] // rows, pixels_BCHW.shape[3] // columns
        whole = pixels_BCHW[..., : grid[0] * rows, : grid[1] * columns]
        return self.patch_embed(whole), grid

    def encode(
        self, patches_BND: Tensor, grid: tuple[int, int], count: int | None = None
    ) -> list[Tensor]:
        """The tokens (B, 1 + N, D) after each of the first `count` blocks (all), before the norm;
        with none of them the embedded tokens."""
        tokens = self.prefix_tokens().expand(patches_BND.shape[0], -1, -1)
        x = torch.cat([tokens, patches_BND], 1)
        if (table := self.positions(grid)) is not None:
            x = x + table
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        outputs = [x]
        for block in self.blocks[:count]:
            x = block(x, shared_rel_pos_bias=shared)
            outputs.append(x)
        return outputs[1:] or outputs

    def attention(self, tokens_BTD: Tensor) -> Tensor:
        """The last block's attention probabilities (B, heads, T, T), for its input."""
        block = self.blocks[-1]
        layer = block.attn
        biases = (layer.q_bias, layer.k_bias, layer.v_bias)
        bias = None if layer.q_bias is None else torch.cat(biases)
        split = linear(block.norm1(tokens_BTD), layer.qkv.weight, bias)
        queries, keys, _ = torch.unflatten(split, -1, (3, layer.num_heads, -1)).unbind(2)
        scores = (queries * layer.scale).transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        if layer.relative_position_bias_table is not None:
            scores = scores + layer._get_rel_pos_bias()
        if self.rel_pos_bias is not None:
            scores = scores + self.rel_pos_bias()
        probabilities: Tensor = scores.softmax(-1)
        return probabilities

    def like_blocks(self, state: Mapping[str, Tensor]) -> beit.Block:
        """A further block of the same kind with these weights."""
        own = self.blocks[-1]
        block = beit.Block(
            self.embed_dim,
            num_heads=own.attn.num_heads,
            qkv_bias=own.attn.q_bias is not None,
            mlp_ratio=own.mlp.fc1.out_features / self.embed_dim,
            init_values=None if own.gamma_1 is None else 1.0,
            norm_layer=partial(nn.LayerNorm, eps=own.norm1.eps),
            window_size=own.attn.window_size,
        )
        load_strictly(block, {k: v for k, v in state.items() if "index" not in k}, "a block")
        return block

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the norm, (B, 1 + N, D)."""
        normed: Tensor = self.norm(self.encode(*self.embed(x))[-1])
        return normed


class DistilledBeit(Beit):
    """A BEiT with a distillation token behind the class token (TinyMIM*-T, arXiv 2301.01296).

    Its tables of relative positions have three further rows, before those of the class token: from
    the token to all others, from others to the token, and to itself.
    """

    pos_embed: nn.Parameter | None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        dim = self.embed_dim
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.num_prefix_tokens = 2
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.pos_embed.shape[1] + 1, dim))
        for block in self.blocks:
            layer = block.attn
            if layer.relative_position_bias_table is None:
                continue
            rows, heads = layer.relative_position_bias_table.shape
            layer.relative_position_bias_table = nn.Parameter(torch.zeros(rows + 3, heads))
            layer.relative_position_index = _with_a_further_token(layer.relative_position_index)
            # timm shapes the looked-up table by it, and counts the class token itself
            layer.window_size = (len(layer.relative_position_index) - 1, 1)

    def prefix_tokens(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], 1)


def _with_a_further_token(index: Tensor) -> Tensor:
    """timm's index (1 + N, 1 + N) of a table's rows, with a second token before the patches."""
    count = len(index) + 1
    first = int(index[0, 0]) - 2  # the row after those of pairs of patches
    wider = index.new_zeros(count, count)
    wider[2:, 2:] = index[1:, 1:]
    for token in (1, 0):  # the class token's rows hold for the pair of both
        start = first if token else first + 3
        wider[token, :] = start
        wider[:, token] = start + 1
        wider[token, token] = start + 2
    wider[0, 1] = first + 3
    return wider


NETWORKS = {"beit": Beit, "distilled-beit": DistilledBeit}
