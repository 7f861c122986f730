"""The same layers written another way, independently of the package: images in planes, one modulated kernel an image, and
a 1x1 convolution with as many groups as images, as StyleGAN2 and the published CIPS generator do. Shared by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_conv(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool, eps: float = 1e-8) -> Tensor:
    """`x` `[B, I, H, W]`, `weight` `[O, I]`, `style` `[B, I]` -> `[B, O, H, W]`."""
    batch, channels, height, width = x.shape
    kernel = (1 / math.sqrt(channels)) * weight[None, :, :, None, None] * style.view(batch, 1, channels, 1, 1)
    if demodulate:
        kernel = kernel * torch.rsqrt(kernel.pow(2).sum([2, 3, 4], keepdim=True) + eps)
    kernel = kernel.view(-1, channels, 1, 1)
    out = F.conv2d(x.reshape(1, batch * channels, height, width), kernel, groups=batch)
    return out.view(batch, -1, height, width)


def styled_conv(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    *,
    demodulate: bool = True,
    negative_slope: float = 0.2,
    gain: float = math.sqrt(2.0),
    eps: float = 1e-8,
    tail: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One layer on planes: convolution, noise `[B, 1, H, W]` times its strength, bias, then leaky ReLU and gain, or `tail`."""
    y = modulated_conv(x, weight, style, demodulate, eps)
    if noise is not None:
        y = y + (noise if strength is None else strength * noise)
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1)
    return F.leaky_relu(y, negative_slope) * gain if tail is None else tail(y)


def to_rgb(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor | None, skip: Tensor | None) -> Tensor:
    """A ToRGB on planes: not demodulated, bias, then the skip `[B, C, H, W]`."""
    out = modulated_conv(x, weight, style, demodulate=False)
    if bias is not None:
        out = out + bias.view(1, -1, 1, 1)
    return out if skip is None else out + skip


def residual(y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """The published block's sum on planes: `x` through a 1x1 convolution of equalised learning rate, or as it is."""
    skip = x if weight is None else F.conv2d(x, weight[:, :, None, None] * (1 / math.sqrt(weight.shape[1])))
    return (y + skip) / math.sqrt(2)


def planes(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, P, C]` as `[B, C, H, W]`."""
    return x.permute(0, 2, 1).reshape(x.shape[0], x.shape[2], height, width)


def pixels(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B, P, C]`."""
    return x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)


def stack(
    x: Tensor,
    weights: list[Tensor],
    styles: list[Tensor],
    biases: list[Tensor],
    noise_strengths: list[Tensor],
    rgb_weights: list[Tensor] = (),
    rgb_styles: list[Tensor] = (),
    rgb_biases: list[Tensor] = (),
    rgb_after: tuple[int, ...] = (),
    skip: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    layout: str = "bpc",
    demodulate: bool = True,
    negative_slope: float = 0.2,
    gain: float = math.sqrt(2.0),
    eps: float = 1e-8,
    blocks: tuple[tuple[int, int], ...] = (),
    skip_weights: list[Tensor | None] = (),
    tail: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """A whole stack with the arguments of `functional.modfc_stack`: `x` and `skip` pixel-major, noise given `[L, B, P]`."""
    assert layout == "bpc"
    batch = (list(styles) + list(rgb_styles))[0].shape[0]
    height, width = 1, x.shape[1]
    x = planes(x.expand(batch, -1, -1), height, width)
    rgb = None if skip is None else planes(skip, height, width)
    entered = None
    for layer in range(-1, len(weights)):
        if layer >= 0:
            n = None if noise is None else noise[layer].view(batch, 1, height, width)
            entered = x if layer in [first for first, _ in blocks] else entered
            x = styled_conv(
                x, weights[layer], styles[layer], biases[layer], n, noise_strengths[layer],
                demodulate=demodulate, negative_slope=negative_slope, gain=gain, eps=eps, tail=tail,
            )  # fmt: skip
            for (_, last), weight in zip(blocks, skip_weights or [None] * len(blocks)):
                if last == layer:
                    x = residual(x, entered, weight)
        for k, after in enumerate(rgb_after):
            if after == layer:
                rgb = to_rgb(x, rgb_weights[k], rgb_styles[k], rgb_biases[k], rgb)
    return pixels(x) if weights else None, pixels(rgb) if rgb_after else None
