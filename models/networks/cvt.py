"""EsViT's CvT (arXiv 2106.09785, github.com/microsoft/esvit): windowed attention in four stages.

Not the CvT of arXiv 2103.15808: it has no class token, and keys keep their resolution. Modules have
upstream's names.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn
from torch.nn.functional import pad, softmax

from models.networks.padded_swin import shift_mask


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a map (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Embed(nn.Module):
    """An overlapping convolution and a norm, which begin a stage."""

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, dim, kernel, stride=stride, padding=padding)
        self.norm = ChannelNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.norm(self.proj(x))
        return embedded


class Stem(nn.Module):
    """Three convolutions with batch norms and ReLUs, which begin the first stage; stride 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, stride in ((3, 2), (dim, 1), (dim, 2)):
            convolution = nn.Conv2d(inputs, dim, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(dim), nn.ReLU()]
        self.stem = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.stem(x)
        return embedded


class WindowAttention(nn.Module):
    """Attention within windows of a map.

    Queries, keys and values come from a depthwise convolution over the whole map. Maps are padded
    to whole windows with zeros, which take part as keys. Scores are scaled by the width of all
    heads together, as upstream does.
    """

    index: Tensor

    def __init__(
        self, dim: int, heads: int, window: int, bias: bool, relative: bool, shift: bool
    ) -> None:
        """
        Args:
            bias: whether the pointwise convolution to queries, keys and values has a bias.
            relative: whether scores have a bias by relative position.
            shift: whether scores have the mask of shifted windows. Upstream does not shift them.
        """
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.scale = dim**-0.5
        self.qkv = nn.ModuleDict(
            {
                "dw": nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
                "bn": nn.BatchNorm2d(dim),
                "pw": nn.Conv2d(dim, 3 * dim, 1, bias=bias),
            }
        )
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.rel_pos_bias_table = None
        if relative:
            rows = (2 * window - 1) ** 2
            self.rel_pos_bias_table = nn.Parameter(torch.zeros(rows, heads))
            index = get_relative_position_index(window, window)
            self.register_buffer("index", index, persistent=False)

    @property
    def is_fixed(self) -> bool:
        """Whether its windows have one size, as scores have something for each pair of cells."""
        return self.shift or self.rel_pos_bias_table is not None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        side = min(self.window, height, width)
        x = pad(x, (0, -width % side, 0, -height % side))
        rows, columns = x.shape[2] // side, x.shape[3] // side
        for layer in self.qkv.values():
            x = layer(x)
        # (B, 3, heads, d, rows, side, columns, side)
        split = torch.unflatten(torch.unflatten(x, 3, (columns, side)), 2, (rows, side))
        split = torch.unflatten(split, 1, (3, self.heads, -1))
        windows = split.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6)
        queries, keys, values = windows.unbind(0)  # (B, rows, columns, heads, T, d)
        scores = queries @ keys.transpose(-2, -1) * self.scale
        if self.rel_pos_bias_table is not None:
            scores = scores + self.rel_pos_bias_table[self.index].permute(2, 0, 1)
        if self.shift:
            mask = shift_mask(rows * side, columns * side, side, x)
            scores = scores + torch.unflatten(mask, 0, (rows, columns)).unsqueeze(2)
        out = softmax(scores, -1) @ values
        out = torch.unflatten(out, 4, (side, side)).permute(0, 3, 6, 1, 4, 2, 5)
        out = out.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        projected: Tensor = self.proj_out(out[..., :height, :width])
        return projected


class PreNorm(nn.Module):
    """A norm before a branch."""

    def __init__(self, dim: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, eps=1e-5)
        self.fn = branch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class Mlp(nn.Module):
    """Two pointwise convolutions."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(dim, hidden, 1), QuickGELU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Blocks(nn.Module):
    """A stage's blocks, each of attention and MLP."""

    def __init__(self, depth: int, dim: int, hidden: int, **attention: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, WindowAttention(dim, **attention)),
                    PreNorm(dim, Mlp(dim, hidden)),
                ]
            )
            for _ in range(depth)
        )

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Each block's output."""
        outputs = []
        for block in self.layers:
            for branch in block:  # type: ignore[attr-defined]
                x = branch(x) + x
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[-1]


class Cvt(nn.Module):
    """EsViT's CvT. Features are a map (B, D, h, w), normalised; their mean is the embedding."""

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        hidden: Sequence[int],
        heads: Sequence[int],
        windows: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        paddings: Sequence[int],
        bias: bool = True,
        relative: bool = False,
        shift: Sequence[bool] = (),
        conv_stem: bool = False,
        num_classes: int = 0,
    ) -> None:
        """All sequences are by stage.

        Args:
            hidden: widths of MLPs.
            windows: sides of attention's windows; on smaller maps they are as large as those.
            kernels, strides, paddings: of the convolutions that begin the stages.
            bias, relative, shift: see `WindowAttention`; no `shift` is false for all stages.
            conv_stem: whether the first stage begins with a `Stem`.
        """
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.stage_count = len(dims)
        inputs = 3
        for number, dim in enumerate(dims):
            embed: nn.Module = (
                Stem(dim)
                if conv_stem and number == 0
                else Embed(inputs, dim, kernels[number], strides[number], paddings[number])
            )
            blocks = Blocks(
                depths[number],
                dim,
                hidden[number],
                heads=heads[number],
                window=windows[number],
                bias=bias,
                relative=relative,
                shift=bool(shift and shift[number]),
            )
            self.add_module(f"stage{number}", nn.Sequential(embed, blocks))
            inputs = dim
        self.norm = ChannelNorm(inputs, eps=1e-5)
        self.head = nn.Linear(inputs, num_classes) if num_classes else nn.Identity()

    def check_size(self, height: int, width: int) -> str | None:
        """What is wrong with inputs of that size, or None."""
        sides = [height, width]
        for number in range(self.stage_count):
            embed, blocks = self.get_submodule(f"stage{number}").children()
            for conv in embed.modules():
                if isinstance(conv, nn.Conv2d):
                    around = 2 * int(conv.padding[0]) - conv.kernel_size[0]
                    sides = [(side + around) // conv.stride[0] + 1 for side in sides]
            attention = next(m for m in blocks.modules() if isinstance(m, WindowAttention))
            if attention.is_fixed and min(sides) < attention.window:
                return (
                    f"stage {number} has {sides[0]}x{sides[1]} cells of it, and a window "
                    f"{attention.window}x{attention.window}"
                )
        return None

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to a map (B, D, h, w)."""
        for number in range(self.stage_count):
            x = self.get_submodule(f"stage{number}")(x)
        features: Tensor = self.norm(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean of a map, or logits (B, K)."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def block_means(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Each block's mean output (B, D), of the last stage's after the norm."""
        means, x = [], pixels_BCHW
        for number in range(self.stage_count):
            stage = self.get_submodule(f"stage{number}")
            blocks = stage.get_submodule("1")
            assert isinstance(blocks, Blocks)
            outputs = blocks.outputs(stage.get_submodule("0")(x))
            x = outputs[-1]
            last = number == self.stage_count - 1
            means += [(self.norm(out) if last else out).mean((2, 3)) for out in outputs]
        return means


NETWORKS = {"cvt": Cvt}
