"""MS-CLIP-S's image tower (arXiv 2207.12661, github.com/Hxyou/MSCLIP).

A ViT whose blocks are shared with the text tower, behind a stem of residual convolutions. A
parallel branch of bottlenecks reads the image, and adapters fuse it into the tokens. Module names
are the checkpoint's; the transformer's first block is the stem.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

NORM_EPS = 1e-12
BOTTLENECK_EPS = 1e-6


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=NORM_EPS)


class BasicBlock(nn.Module):
    """A residual block of one convolution, with a 1x1 convolution as its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn1(self.conv1(x)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A residual bottleneck of three convolutions, with a 1x1 convolution as its shortcut."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden, eps=BOTTLENECK_EPS)
        self.conv2 = _conv(hidden, hidden, 3, stride)
        self.bn2 = nn.BatchNorm2d(hidden, eps=BOTTLENECK_EPS)
        self.conv3 = _conv(hidden, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs, eps=BOTTLENECK_EPS)
        self.residual_conv = _conv(inputs, outputs, 1, stride)
        self.residual_bn = nn.BatchNorm2d(outputs, eps=BOTTLENECK_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(relu(self.bn2(self.conv2(y)))))
        return relu(y + self.residual_bn(self.residual_conv(x)))


class Stem(nn.Module):
    """Images to a grid (B, width, h, w)."""

    def __init__(self, width: int, strides: Sequence[int], kernel: int) -> None:
        super().__init__()
        inputs = width >> len(strides)
        self.conv1 = _conv(3, inputs, kernel, 2)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.resnet_stage = nn.Sequential()
        for i, stride in enumerate(strides):
            self.resnet_stage.add_module(f"conv_{i}", BasicBlock(inputs, 2 * inputs, stride))
            inputs *= 2
        self.last_conv = _conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid: Tensor = self.last_conv(self.resnet_stage(relu(self.bn1(self.conv1(x)))))
        return grid


class FirstStage(nn.Module):
    """The first stage of the parallel branch."""

    def __init__(self, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv = _conv(3, outputs, kernel, stride)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


class Stage(nn.Module):
    """A further stage of the parallel branch."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.resnet_stage = nn.Sequential()
        self.resnet_stage.add_module("conv_0", Bottleneck(inputs, outputs, hidden, stride))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.resnet_stage(x)
        return result


class Convolved(nn.Module):
    """A convolution with an optional batch norm."""

    def __init__(self, conv: nn.Conv2d, *, norm: bool) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn(self.conv(x))
        return result


class Adapter(nn.Module):
    """Fuses the branch's features into the tokens. The class token is doubled, as upstream does."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        reduce = nn.Conv2d(channels, channels, kernel, stride, groups=channels, bias=False)
        self.top2bottom_dw_conv = Convolved(reduce, norm=True)
        self.top2bottom_pw_conv = Convolved(_conv(channels, width, 1), norm=False)
        self.bottom_dw_conv = Convolved(_conv(width, width, 3, groups=width), norm=True)
        self.ln_adapt = _norm(width)

    def forward(self, tokens_BTD: Tensor, branch_BChw: Tensor) -> Tensor:
        projected = self.top2bottom_pw_conv(self.top2bottom_dw_conv(branch_BChw))
        grid = tokens_BTD[:, 1:].transpose(1, 2).reshape(projected.shape)
        patches = (self.bottom_dw_conv(grid) + projected).flatten(2).transpose(1, 2)
        fused: Tensor = self.ln_adapt(torch.cat([2 * tokens_BTD[:, :1], patches], 1))
        return fused


class FusedAttention(nn.Module):
    """Self-attention under the parameter names of PyTorch's `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        projected = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = projected.reshape(batch, count, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        context = scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out_proj(context.transpose(1, 2).reshape(batch, count, width))
        return result


class Block(nn.Module):
    """CLIP's residual block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = FusedAttention(width, heads)
        self.ln_1 = _norm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))
        self.ln_2 = _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class Transformer(nn.Module):
    """The stem, the blocks, and the parallel branch with its adapters."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        stem_strides: Sequence[int],
        channels: Sequence[int],
        bottlenecks: Sequence[int],
        strides: Sequence[int],
        kernels: Sequence[int],
        kernel_strides: Sequence[int],
        first_kernels: Sequence[int],
    ) -> None:
        super().__init__()
        blocks = [Block(width, heads, hidden) for _ in range(layers - 1)]
        self.resblocks = nn.ModuleList([Stem(width, stem_strides, first_kernels[0]), *blocks])
        self.parallel_branch_v = nn.ModuleList(
            [FirstStage(channels[0], strides[0], first_kernels[1])]
        )
        for (inputs, outputs), inner, stride in zip(
            pairwise(channels), bottlenecks, strides[1:], strict=True
        ):
            self.parallel_branch_v.append(Stage(inputs, outputs, inner, stride))
        self.parallel_lateral_adapter = nn.ModuleList(
            Adapter(width, *each) for each in zip(channels, kernels, kernel_strides, strict=True)
        )


class MsClipImage(nn.Module):
    """The image tower, with timm's method names.

    Args:
        hidden: width of the MLPs.
        projected: width of the shared embedding space.
        stem_strides: stride of each residual block of the stem.
        channels: output channels of each stage of the branch.
        bottlenecks: inner channels of each stage of the branch but the first.
        strides: stride of each stage of the branch.
        kernels: kernel size of each adapter.
        kernel_strides: stride of each adapter.
        lateral: number of the block that each adapter comes before.
        first_kernels: kernel sizes of the first convolutions of the stem and of the branch.
    """

    num_classes = 0
    num_prefix_tokens = 1

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        projected: int,
        stem_strides: Sequence[int],
        channels: Sequence[int],
        bottlenecks: Sequence[int],
        strides: Sequence[int],
        kernels: Sequence[int],
        kernel_strides: Sequence[int],
        lateral: Sequence[int],
        first_kernels: Sequence[int] = (3, 3),
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.lateral = list(lateral)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        cells = (img_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.zeros(cells + 1, width))
        self.ln_pre = _norm(width)
        self.transformer = Transformer(
            width, heads, hidden, layers, stem_strides,
            channels, bottlenecks, strides, kernels, kernel_strides, first_kernels,
        )  # fmt: skip
        self.ln_post = _norm(width)
        self.proj = nn.Parameter(torch.zeros(width, projected))

    def forward_features(self, pixels_BCHW: Tensor) -> Tensor:
        """Tokens after the last norm, (B, 1 + N, width), class token first."""
        parts = self.transformer
        stem, *blocks = parts.resblocks
        grid = stem(pixels_BCHW).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(grid.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, grid], 1) + self.positional_embedding)
        branch = pixels_BCHW
        for number, block in enumerate(blocks, 1):
            if number in self.lateral:
                j = self.lateral.index(number)
                branch = parts.parallel_branch_v[j](branch)
                x = parts.parallel_lateral_adapter[j](x, branch)
            x = block(x)
        normed: Tensor = self.ln_post(x)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token projected to the shared space, (B, projected)."""
        return x[:, 0] @ self.proj


NETWORKS = {"ms-clip-image": MsClipImage}
