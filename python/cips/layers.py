"""Layers with an equalised learning rate (StyleGAN2), shared by the mapping network and the discriminator.

A parameter is drawn from N(0, 1) and multiplied at run time by its He constant, so that Adam's steps are
equally large relative to every layer. The gain of a leaky ReLU, sqrt(2), is multiplied into weight and bias
beforehand: for g > 0 `g lrelu(y) = lrelu(g y)`, which saves a pass over the activations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cips_kernels import filters

from .convolution import conv2d

NEGATIVE_SLOPE = 0.2
LRELU_GAIN = math.sqrt(2.0)


class PixelNorm(nn.Module):
    """Divides each vector of the last dimension by its root mean square: `x rsqrt(mean(x^2) + 1e-8)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Fully-connected layer `act(W x + b)` with an equalised learning rate.

    The parameters `weight` `[out, in]` ~ N(0, 1) / lr_mul and `bias` `[out]` = 0 are used as `weight * lr_mul
    / sqrt(in)` and `bias * lr_mul`: the layer starts the same for every `lr_mul` and learns `lr_mul` times as
    fast.

    Args:
        in_features, out_features: sizes of the last dimension.
        lr_mul: learning-rate multiplier.
        activation: "lrelu" (slope 0.2, gain sqrt 2) or "linear".
    """

    def __init__(
        self, in_features: int, out_features: int, *, lr_mul: float = 1.0, activation: str = "linear"
    ) -> None:
        super().__init__()
        if activation not in ("linear", "lrelu"):
            raise ValueError(f"activation: expected 'linear' or 'lrelu', got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.lr_mul, self.activation = lr_mul, activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with every factor multiplied in: the layer is `leaky_relu(x W^T + b)`, or without activation."""
        scale = self.lr_mul * (LRELU_GAIN if self.activation == "lrelu" else 1.0)
        return self.weight * (scale / math.sqrt(self.in_features)), self.bias * scale

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[N, in]` -> `[N, out]`."""
        gain = LRELU_GAIN if self.activation == "lrelu" else 1.0
        scale = gain * self.lr_mul
        # alpha and beta scale inside the matrix product: no scaled copy of the weight
        y = torch.addmm(self.bias, x, self.weight.t(), beta=scale, alpha=scale / math.sqrt(self.in_features))
        return F.leaky_relu(y, NEGATIVE_SLOPE) if self.activation == "lrelu" else y

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, lr_mul={self.lr_mul:g}, activation={self.activation!r}"
        )


class EqualConv2d(nn.Module):
    """Convolution `act(W * x + b)` with an equalised learning rate, computed in the dtype of its input.

    The parameters `weight` `[out, in, k, k]` ~ N(0, 1) and `bias` `[out]` = 0 stay in float32.

    Args:
        in_channels, out_channels, kernel_size: as in `nn.Conv2d`.
        stride, padding: as in `nn.Conv2d`.
        bias: whether there is one.
        activation: "lrelu" (slope 0.2, gain sqrt 2) or "linear".
        gain: one more factor on the result; multiplied into weight and bias, hence free.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        activation: str = "lrelu",
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if activation not in ("linear", "lrelu"):
            raise ValueError(f"activation: expected 'linear' or 'lrelu', got {activation!r}")
        self.stride, self.padding, self.activation = stride, padding, activation
        self.gain = gain * (LRELU_GAIN if activation == "lrelu" else 1.0)
        self.scale = self.gain / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution by itself, plus `bias` where one is given."""
        weight = (self.weight * self.scale).to(x.dtype)
        return conv2d(x, weight, bias, stride=self.stride, padding=self.padding)

    def scaled_bias(self) -> Tensor:
        """`[out]`: the bias that goes with `product`, in the parameter's dtype."""
        assert self.bias is not None, "this layer has none"
        return self.bias * self.gain

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` `[B, in, H, W]` -> `[B, out, H', W']`, with `residual` of that shape added behind the activation."""
        if self.bias is not None and self.activation == "lrelu" and filters.serves(x):
            # one pass for what PyTorch does in two or three: bias, activation, sum
            return filters.bias_lrelu(self.product(x), self.scaled_bias(), residual, negative_slope=NEGATIVE_SLOPE)
        y = self.product(x, None if self.bias is None else self.scaled_bias().to(x.dtype))
        y = F.leaky_relu(y, NEGATIVE_SLOPE) if self.activation == "lrelu" else y
        return y if residual is None else y + residual

    def extra_repr(self) -> str:
        out_channels, in_channels, size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, activation={self.activation!r}, "
            f"gain={self.gain:.4g}"
        )
