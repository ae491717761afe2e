"""ViTGAN's generators (arXiv 2107.04589, github.com/mlpc-ucsd/ViTGAN).

A transformer over a grid of Fourier features. Its tokens become pixels by StyleGAN 2's convolutions
(arXiv 1912.04958), or by a small network per tile (CIPS, arXiv 2011.13775).
Scales of the equalised learning rate are folded into the weights by the checkpoint format.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, layer_norm, leaky_relu, pad, silu

NORM_EPS = 1e-3
EPS = 1e-8
GAIN = 2**0.5


class Mapping(nn.Sequential):
    """Latents (B, D), normalised to unit mean square, to styles (B, D) by linear layers."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__(*(nn.Linear(dim, dim) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt()
        for layer in self:
            x = leaky_relu(layer(x), 0.2) * GAIN
        return x


class Places(nn.Module):
    """Fourier features (1, D, side, side) of a grid of coordinates from -1 to 1."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(2, dim, 1)

    def forward(self) -> Tensor:
        steps = torch.linspace(-1, 1, self.side, device=self.conv.weight.device)
        down, across = torch.meshgrid(steps, steps, indexing="ij")
        places = torch.stack([across, down])[None].to(self.conv.weight.dtype)
        features: Tensor = self.conv(places).sin()
        return features


class StyledNorm(nn.Module):
    """A layer norm whose scale and shift are computed from the style."""

    def __init__(self, dim: int, style: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(style, dim)
        self.beta = nn.Linear(style, dim)

    def forward(self, x_BTD: Tensor, style_BD: Tensor) -> Tensor:
        normed = layer_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS)
        styled: Tensor = normed * (1 + self.gamma(style_BD)[:, None]) + self.beta(style_BD)[:, None]
        return styled


class DistanceAttention(nn.Module):
    """Attention by L2 distance, as upstream computes it.

    The mean square of the queries is also used for the keys, and the distance enters the softmax
    with a positive sign.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(1))
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        parts = self.to_qkv(x).reshape(batch, count, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        square = query.square().mean(-1)
        distance = square[..., None] - 2 * query @ key.transpose(-2, -1) + square[..., None, :]
        scale = self.temperature * (dim // self.heads) ** -0.5
        context = (distance * scale).softmax(-1) @ value
        result: Tensor = self.to_out(context.transpose(1, 2).reshape(batch, count, dim))
        return result


class Block(nn.Module):
    """A transformer block whose residual connections start after the norms."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = StyledNorm(dim, dim)
        self.attn = DistanceAttention(dim, heads)
        self.norm2 = StyledNorm(dim, dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.norm1(x, style)
        x = self.norm2(self.attn(x) + x, style)
        result: Tensor = self.fc2(silu(self.fc1(x))) + x
        return result


class Modulated(nn.Module):
    """A convolution whose weights are scaled by the style, per input channel.

    Args:
        up: double the resolution first, followed by a blur.
        demodulate: normalise the scaled weights of each output channel.
        blur: side of the blur's kernel.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        style: int,
        *,
        up: bool,
        demodulate: bool,
        blur: int = 4,
    ) -> None:
        super().__init__()
        self.up = up
        self.demodulate = demodulate
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, size, size))
        self.modulation = nn.Linear(style, inputs)
        if up:
            self.register_buffer("blur", torch.zeros(blur, blur))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch = x.shape[0]
        scaled = self.weight * self.modulation(style)[:, None, :, None, None]
        if self.demodulate:
            scaled = scaled * (scaled.square().sum((2, 3, 4), keepdim=True) + EPS).rsqrt()
        x = x.flatten(0, 1)[None]
        if self.up:
            weight = scaled.transpose(1, 2).flatten(0, 1)
            x = conv_transpose2d(x, weight, stride=2, groups=batch)
            x = x.reshape(batch, -1, *x.shape[2:])
            blur = self.get_buffer("blur").flip(0, 1)
            beyond = len(blur) - self.weight.shape[-1] - 1  # StyleGAN's padding for a factor of 2
            before, after = (beyond + 1) // 2 + 1, beyond // 2 + 1
            kernel = blur.expand(x.shape[1], 1, *blur.shape)
            return conv2d(pad(x, (before, after, before, after)), kernel, groups=x.shape[1])
        padding = self.weight.shape[-1] // 2
        x = conv2d(x, scaled.flatten(0, 1), padding=padding, groups=batch)
        return x.reshape(batch, -1, *x.shape[2:])


class Styled(nn.Module):
    """A modulated convolution, additive noise (B, 1, h, w), a bias and a leaky ReLU."""

    def __init__(
        self, inputs: int, outputs: int, size: int, style: int, *, up: bool, blur: int = 4
    ) -> None:
        super().__init__()
        self.conv = Modulated(inputs, outputs, size, style, up=up, demodulate=True, blur=blur)
        self.noise = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        x = self.conv(x, style)
        if noise is not None:
            x = x + self.noise * noise
        return leaky_relu(x + self.bias[:, None, None], 0.2) * GAIN


class ToRgb(nn.Module):
    """Features (B, C, h, w) to colours (B, 3, h, w)."""

    def __init__(self, inputs: int, style: int) -> None:
        super().__init__()
        self.conv = Modulated(inputs, 3, 1, style, up=False, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        rgb: Tensor = self.conv(x, style) + self.bias[:, None, None]
        return rgb


class ConvolutionPixels(nn.Module):
    """A convolutional generator on the grid of tokens; every other layer doubles the resolution."""

    def __init__(self, dim: int, channels: Sequence[int], side: int, blur: int) -> None:
        super().__init__()
        inputs = [dim, *channels[:-1]]
        self.side = side
        self.convs = nn.ModuleList(
            Styled(before, after, 3, dim, up=i % 2 == 0, blur=blur)
            for i, (before, after) in enumerate(zip(inputs, channels, strict=True))
        )
        self.to_rgb = ToRgb(channels[-1], dim)
        self.size = side << (len(channels) // 2)
        # shapes of one image's noise tensors
        self.noise_shapes = [(1, 1, *2 * (side << (i // 2 + 1),)) for i in range(len(channels))]

    def forward(self, x_BTD: Tensor, style: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
        batch, _, dim = x_BTD.shape
        x = x_BTD.transpose(1, 2).reshape(batch, dim, self.side, self.side)
        for conv, each in zip(self.convs, noise, strict=True):
            x = conv(x, style, each)
        rgb: Tensor = self.to_rgb(x, style)
        return rgb


class TilePixels(nn.Module):
    """A network that generates one tile of the image from each token."""

    def __init__(self, dim: int, width: int, depth: int, layers: int, side: int, size: int) -> None:
        super().__init__()
        self.side = side
        self.size = size
        tile = size // side
        self.style = Mapping(dim, depth)
        self.places = Places(dim, tile)
        inputs = [dim] + [width] * (layers - 1)
        self.convs = nn.ModuleList(Styled(before, width, 1, dim, up=False) for before in inputs)
        self.to_rgb = ToRgb(width, dim)
        self.noise_shapes = [(side * side, 1, tile, tile)] * layers

    def forward(self, x_BTD: Tensor, style: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
        style = self.style(x_BTD.flatten(0, 1))
        x = self.places().expand(style.shape[0], -1, -1, -1)
        for conv, each in zip(self.convs, noise, strict=True):
            x = conv(x, style, each)
        tiles = self.to_rgb(x, style).unflatten(0, (x_BTD.shape[0], self.side, self.side))
        pixels = tiles.permute(0, 3, 1, 4, 2, 5).reshape(x_BTD.shape[0], 3, self.size, self.size)
        images: Tensor = (0.5 * pixels + 0.5).clamp(0, 1)
        return images


class VitGan(nn.Module):
    """Latents (B, D) to images (B, 3, size, size), nominally within 0..1.

    Args:
        dim: channels of latents, styles and tokens.
        hidden: width of the MLPs.
        mapping: linear layers from latent to style.
        side: tokens along each side of the grid.
        channels: output channels of each convolution; None generates tiles instead.
        blur: side of the blur's kernel behind upsampling.
        size: side of the image in pixels, for tiles.
        tile_width: channels of the tile network.
        tile_layers: layers of the tile network.
        tile_mapping: linear layers from token to the tile network's style.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        mapping: int,
        side: int,
        channels: Sequence[int] | None = None,
        blur: int = 4,
        size: int = 32,
        tile_width: int = 0,
        tile_layers: int = 0,
        tile_mapping: int = 0,
    ) -> None:
        super().__init__()
        self.latent_dim = dim
        self.style = Mapping(dim, mapping)
        self.places = Places(dim, side)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm = StyledNorm(dim, dim)
        self.pixels: ConvolutionPixels | TilePixels
        if channels is not None:
            self.pixels = ConvolutionPixels(dim, channels, side, blur)
        else:
            self.pixels = TilePixels(dim, tile_width, tile_mapping, tile_layers, side, size)

    @property
    def noise_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shapes of one image's noise tensors, in the order of the layers."""
        return self.pixels.noise_shapes

    def forward(self, latent_BD: Tensor, noise: Sequence[Tensor] = ()) -> Tensor:
        """Images (B, 3, size, size). `noise` is empty, or one tensor per layer, images along the
        first axis."""
        style = self.style(latent_BD)
        x = self.places().flatten(2).transpose(1, 2).expand(style.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, style)
        each: Sequence[Tensor | None] = noise or [None] * len(self.noise_shapes)
        images: Tensor = self.pixels(self.norm(x, style), style, each)
        return images


NETWORKS = {"vitgan": VitGan}
