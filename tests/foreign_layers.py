"""Layers of other code bases, written down anew from their formulas: what `patch` must answer like.

By grouped convolutions, one group an image, as those code bases have it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grouped(x: Tensor, weights: Tensor) -> Tensor:
    """`x` `[B, I, H, W]` times a matrix an image, `[B, O, I, k, k]`."""
    batch, out, _, k, _ = weights.shape
    flat = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weights.flatten(0, 1), padding=k // 2, groups=batch)
    return flat.view(batch, out, *x.shape[2:])


class EqualLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.full((outputs,), bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(x.shape[1]), self.bias)


class ModulatedConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, k: int, style: int, demodulate: bool = True, upsample: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, k, k))
        self.scale = 1 / math.sqrt(inputs * k * k)
        self.modulation = EqualLinear(style, inputs, 1.0)
        self.demodulate, self.upsample, self.downsample = demodulate, upsample, False

    def forward(self, input: Tensor, style: Tensor) -> Tensor:
        w = self.scale * self.weight * self.modulation(style)[:, None, :, None, None]
        if self.demodulate:
            w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        return grouped(input, w)


class NoiseInjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1))

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            noise = torch.randn_like(image[:, :1])
        return image + self.weight * noise


class FusedLeakyReLU(nn.Module):
    def __init__(self, channels: int, negative_slope: float = 0.2, scale: float = 2**0.5) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias[:, None, None], self.negative_slope) * self.scale


class StyledConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, k: int, style: int, **options) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, k, style, **options)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(outputs)

    def forward(self, input: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.activate(self.noise(self.conv(input, style), noise))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class ToRGB(nn.Module):
    def __init__(self, inputs: int, style: int, upsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(inputs, 3, 1, style, demodulate=False)
        self.bias = nn.Parameter(torch.randn(1, 3, 1, 1))
        if upsample is not None:
            self.upsample = upsample

    def forward(self, input: Tensor, style: Tensor, skip: Tensor | None = None) -> Tensor:
        out = self.conv(input, style) + self.bias
        if skip is None:
            return out
        return out + (self.upsample(skip) if hasattr(self, "upsample") else skip)


class SynthesisLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, style: int, size: int, k: int = 1, up: int = 1, activation: str = "lrelu", clamp: float | None = None, use_noise: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, k, k))
        self.affine = EqualLinear(style, inputs, 1.0)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.up, self.activation, self.conv_clamp, self.use_noise = up, activation, clamp, use_noise
        self.act_gain = math.sqrt(2) if activation == "lrelu" else 1.0
        if use_noise:
            self.register_buffer("noise_const", torch.randn(size, size))
            self.noise_strength = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor, w: Tensor, noise_mode: str = "random", fused_modconv: bool = True, gain: float = 1):
        weights = self.weight * self.affine(w)[:, None, :, None, None]
        weights = weights * torch.rsqrt(weights.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = grouped(x, weights)
        if self.use_noise and noise_mode != "none":
            noise = self.noise_const if noise_mode == "const" else torch.randn_like(y[:, :1])
            y = y + noise * self.noise_strength
        y = y + self.bias[:, None, None]
        y = (F.leaky_relu(y, 0.2) if self.activation == "lrelu" else y) * (self.act_gain * gain)
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp * gain, self.conv_clamp * gain)


class ToRGBLayer(nn.Module):
    def __init__(self, inputs: int, style: int, clamp: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.affine = EqualLinear(style, inputs, 1.0)
        self.bias = nn.Parameter(torch.randn(3))
        self.weight_gain, self.conv_clamp = 1 / math.sqrt(inputs), clamp

    def forward(self, x: Tensor, w: Tensor, fused_modconv: bool = True) -> Tensor:
        y = grouped(x, self.weight * (self.affine(w) * self.weight_gain)[:, None, :, None, None])
        y = y + self.bias[:, None, None]
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)
