"""The official generators in plain PyTorch, one formula a class, as the truth that converted checkpoints are held against.

Written from the published description of the classes: the names, shapes and order of a state dict follow from how the modules
stand in each other, and nothing here is taken from the package under test.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = math.sqrt(2)


class Affine(nn.Module):
    """A linear layer with an equalised learning rate; the weight is kept divided by `lr_mul`."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, lr_mul: float = 1.0, active: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.lr_mul, self.active = lr_mul, active

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight * self.lr_mul / math.sqrt(x.shape[1])).T + self.bias * self.lr_mul
        return F.leaky_relu(y, 0.2) * GAIN if self.active else y


class UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


class Modulated(nn.Module):
    """A 1x1 convolution whose input channels each image scales, one group an image."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, demodulate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 1, 1))
        self.modulation = Affine(style_dim, inputs, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        batch, inputs, height, width = x.shape
        kernel = self.weight / math.sqrt(inputs) * self.modulation(w).view(batch, 1, inputs, 1, 1)
        if self.demodulate:
            kernel = kernel / (kernel.square().sum(2, keepdim=True) + 1e-8).sqrt()
        y = F.conv2d(x.reshape(1, -1, height, width), kernel.flatten(0, 1), groups=batch)
        return y.view(batch, -1, height, width)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Activation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


def sine(y: Tensor, kind: str) -> Tensor:
    """`y` `[B, C, H, W]` through "sin", which has no factor, or "sinrelu", where even channels are leaky ReLUs and stand
    before the odd ones, which are sines, all times sqrt 2."""
    if kind == "sin":
        return torch.sin(y)
    assert kind == "sinrelu"
    return torch.cat((F.leaky_relu(y[:, ::2], 0.2), torch.sin(y[:, 1::2])), 1) * GAIN


class Styled(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU times sqrt 2 or a sine. `noise` `[B, 1, H, W]`, or None for none."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.conv = Modulated(inputs, outputs, style_dim, demodulate=True)
        self.noise = Noise()
        if activation is None:
            self.activate = Activation(outputs)
        else:  # the bias is the layer's own
            self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        x = self.conv(x, w)
        x = x if noise is None else x + self.noise.weight * noise
        if self.activation is not None:
            return sine(x + self.bias, self.activation)
        return F.leaky_relu(x + self.activate.bias.view(1, -1, 1, 1), 0.2) * GAIN


class Colour(nn.Module):
    def __init__(self, inputs: int, style_dim: int) -> None:
        super().__init__()
        self.conv = Modulated(inputs, 3, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.conv(x, w) + self.bias


class EqualConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / math.sqrt(x.shape[1]))


class Block(nn.Module):
    """Two styled layers beside a skip, divided by sqrt 2."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, activation: str | None = None) -> None:
        super().__init__()
        self.conv1 = Styled(inputs, outputs, style_dim, activation)
        self.conv2 = Styled(outputs, outputs, style_dim, activation)
        self.skip = nn.Sequential(EqualConv(inputs, outputs)) if inputs != outputs else None

    def forward(self, x: Tensor, w: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        y = self.conv2(self.conv1(x, w, first), w, second)
        return (y + (x if self.skip is None else self.skip(x))) / math.sqrt(2)


class Table(nn.Module):
    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, size, size))


class OfficialGenerator(nn.Module):
    """`CIPSskip`, or `CIPSres` with `residual`.

    Args:
        size: of the table.
        widths: of the first layer and of each block of two.
        fourier, table: channels.
        activation: None for a leaky ReLU, "sin" or "sinrelu".
    """

    def __init__(
        self,
        size: int,
        widths: tuple[int, ...],
        *,
        residual: bool = False,
        fourier: int = 512,
        table: int = 512,
        style_dim: int = 512,
        mapping: int = 8,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.residual = size, residual
        self.lff = nn.ModuleDict({"ffm": nn.ModuleDict({"conv": nn.Conv2d(2, fourier, 1)})})
        self.emb = Table(table, size)
        first = Styled(fourier + table, widths[0], style_dim, activation)
        pairs = list(zip(widths, widths[1:]))
        if residual:
            self.linears = nn.ModuleList([first, *(Block(i, o, style_dim, activation) for i, o in pairs)])
            self.to_rgb_last = Colour(widths[-1], style_dim)
        else:
            self.conv1 = first
            layers = [Styled(a, o, style_dim, activation) for i, o in pairs for a in (i, o)]
            self.linears = nn.ModuleList(layers)
            self.to_rgbs = nn.ModuleList(Colour(o, style_dim) for _, o in pairs)
        layers = [Affine(style_dim, style_dim, lr_mul=0.01, active=True) for _ in range(mapping)]
        self.style = nn.Sequential(UnitLength(), *layers)

    def randomise(self, seed: int = 0) -> OfficialGenerator:
        """Every parameter at a value that matters: no zero, no one."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                drawn = torch.randn(p.shape, generator=random)
                if name.startswith("style.") and name.endswith("bias"):
                    drawn *= 30  # used times 0.01
                elif name.endswith(("bias", "noise.weight")) or name.startswith("lff"):
                    p.add_(drawn * 0.4)
                    continue
                p.copy_(drawn * 100 if name.startswith("style.") and name.endswith("weight") else drawn)
        return self

    def encode(self, coords: Tensor) -> Tensor:
        batch, _, height, width = coords.shape
        conv = self.lff["ffm"]["conv"]
        fourier = torch.sin(F.conv2d(coords, conv.weight, conv.bias))
        table = self.emb.input.expand(batch, -1, -1, -1)
        if not (self.training and height == width == self.size):
            grid = coords.permute(0, 2, 3, 1)
            table = F.grid_sample(table, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return torch.cat((fourier, table), 1)

    def forward(
        self,
        coords: Tensor,
        z: Tensor,
        noise: Tensor | None = None,
        *,
        truncation: float = 1.0,
        truncation_latent: Tensor | None = None,
        input_is_latent: bool = False,
    ) -> Tensor:
        """coords `[B, 2, H, W]`, noise `[L, B, 1, H, W]` or None for none -> `[B, 3, H, W]`."""
        if truncation < 1:
            z = truncation_latent + truncation * (z - truncation_latent)  # before the mapping network, whatever z is
        w = z if input_is_latent else self.style(z)
        x = self.encode(coords)
        draws = iter(noise) if noise is not None else iter([None] * 99)
        if self.residual:
            x = self.linears[0](x, w, next(draws))
            for block in list(self.linears)[1:]:
                x = block(x, w, next(draws), next(draws))
            return self.to_rgb_last(x, w)
        x, rgb = self.conv1(x, w, next(draws)), 0
        for k, to_rgb in enumerate(self.to_rgbs):
            x = self.linears[2 * k](x, w, next(draws))
            x = self.linears[2 * k + 1](x, w, next(draws))
            rgb = rgb + to_rgb(x, w)
        return rgb


def full_grid(height: int, width: int) -> Tensor:
    """float32 coordinates `[1, 2, H, W]`: x along a row, then y, from -1 to 1, both ends included."""
    x = torch.linspace(-1, 1, width, dtype=torch.float64).float().expand(height, width)
    y = torch.linspace(-1, 1, height, dtype=torch.float64).float()[:, None].expand(height, width)
    return torch.stack((x, y))[None]
