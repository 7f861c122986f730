"""Layers of StyleGAN2's generator (Karras et al. 2020) by PyTorch's own convolutions: modulated 3x3, and the doublings.

A style scales the activations that a convolution reads and its demodulation those that it writes, so all images share one
weight: `y = d * (c W (s * x))`, `d_i = 1 / sqrt(sum_jk (c W_ijk s_j)^2 + 1e-8)`, `c = 1 / sqrt(9 I)`. That equals a modulated
weight an image, and is one convolution instead of as many groups as there are images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cips_kernels.modules import EqualizedLinear

from .layers import LRELU_GAIN, NEGATIVE_SLOPE

TAPS = (1.0, 3.0, 3.0, 1.0)
EPS = 1e-8


def _filter(gain: float) -> Tensor:
    """`[1, 1, 4, 4]`: the outer product of the taps, its sum `gain`."""
    taps = torch.tensor(TAPS)
    kernel = taps[:, None] * taps
    return (kernel * (gain / kernel.sum()))[None, None]


class Upsample(nn.Module):
    """Twice the height and width: zeros between the pixels, then the filter [1,3,3,1] x [1,3,3,1] / 16.

    Inside the image that is bilinear interpolation between pixel centres; beyond its border lie zeros.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", _filter(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, C, 2 H, 2 W]`."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class Smooth(nn.Module):
    """The filter behind a transposed convolution: `[B, C, 2 H + 1, 2 W + 1]` -> `[B, C, 2 H, 2 W]`, gain 4 for the zeros
    between the pixels."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", _filter(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


class ModulatedConv(nn.Module):
    """A modulated, demodulated 3x3 convolution with noise, bias and leaky ReLU (slope 0.2, gain sqrt 2).

    Args:
        in_channels, out_channels: I and O.
        style_dim: length of w.
        up: doubles height and width: a transposed convolution of stride 2, then the filter.

    Parameters: `weight` `[O, I, 3, 3]` ~ N(0, 1), `affine` from w to the style, whose bias starts at 1, `bias` `[O]` = 0, and
    `noise_strength`, a number that starts at 0.
    """

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, *, up: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.affine = EqualizedLinear(style_dim, in_channels, bias_init=1.0)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.scale = 1.0 / math.sqrt(9 * in_channels)
        self.smooth = Smooth() if up else None

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """
        Args:
            x: `[B, I, H, W]` in the compute dtype.
            w: `[B, style_dim]` in the parameters' dtype.
            noise: `[B, 1, H', W']` at the result's size, or None.

        Returns:
            `[B, O, H', W']` in the dtype of `x`.
        """
        s, weight = self.affine(w), self.weight * self.scale
        d = torch.rsqrt(F.linear(s.square(), weight.square().sum((2, 3))) + EPS)
        x, weight = x * s.to(x.dtype)[:, :, None, None], weight.to(x.dtype)
        if self.smooth is None:
            y = F.conv2d(x, weight, padding=1)
        else:
            y = self.smooth(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        # g lrelu(y) = lrelu(g y): the gain costs no pass over the activations
        d, bias = (LRELU_GAIN * d).to(x.dtype), (LRELU_GAIN * self.bias).to(x.dtype)
        y = torch.addcmul(bias[:, None, None], y, d[:, :, None, None])
        if noise is not None:
            y = y + (LRELU_GAIN * self.noise_strength * noise).to(x.dtype)
        return F.leaky_relu(y, NEGATIVE_SLOPE)

    def extra_repr(self) -> str:
        out_channels, in_channels, *_ = self.weight.shape
        return f"{in_channels}, {out_channels}, up={self.smooth is not None}"
