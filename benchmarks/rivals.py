"""The same layers written with PyTorch's own operators: what a user has without this package.

Two ways of writing them. `grouped_conv` follows the published generator: images in planes `[B, C, H, W]`, one
modulated weight an image, a 1x1 convolution with `groups=B`, then noise, bias, leaky ReLU and gain as
separate operations. `bmm` is what a careful author would write today: pixels first (`[B, P, C]`), one batched
matrix product a layer, and as few passes over the activations as eager PyTorch allows. Both compute the
formulas of `cips_kernels.reference`; both are also given to `torch.compile` (see `providers.py`).

Weights are modulated in float32 and rounded once to the compute dtype; ToRGB is accumulated in float32. Noise
is drawn afresh in each layer of each call, as the published generator does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 0.2
GAIN = math.sqrt(2.0)
EPS = 1e-8

# "fresh" draws new noise, None adds none, a tensor [L, B, P] is used as it is.
Noise = Tensor | str | None


def modulate(weight: Tensor, style: Tensor, demodulate: bool = True, gain: float = 1.0) -> Tensor:
    """One weight an image, `[B, O, I]` float32, from `weight [O, I]` and `style [B, I]`.

    The squared norm of a row of `W * s` is a product of `s^2` with `W^2`, so that demodulation costs a small
    matrix product and only one pass over `[B, O, I]`.
    """
    scaled = weight * (1.0 / math.sqrt(weight.shape[1]))
    if not demodulate:
        return scaled * style[:, None, :]
    norm = F.linear(style.square(), scaled.square())
    return scaled * style[:, None, :] * (torch.rsqrt(norm + EPS) * gain)[:, :, None]


def modulate_as_published(weight: Tensor, style: Tensor, demodulate: bool = True) -> Tensor:
    """The same written as the published generator does: scale, square, sum, divide."""
    modulated = (1.0 / math.sqrt(weight.shape[1])) * weight * style[:, None, :]
    if demodulate:
        modulated = modulated * torch.rsqrt(modulated.square().sum(2, keepdim=True) + EPS)
    return modulated


def _conv(x: Tensor, modulated: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernels = modulated.to(x.dtype).reshape(batch * modulated.shape[1], channels, 1, 1)
    out = F.conv2d(x.reshape(1, batch * channels, height, width), kernels, groups=batch)
    return out.reshape(batch, -1, height, width)


def grouped_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    styles: Sequence[Tensor],
    biases: Sequence[Tensor],
    strengths: Sequence[Tensor],
    rgb_weights: Sequence[Tensor] = (),
    rgb_styles: Sequence[Tensor] = (),
    rgb_biases: Sequence[Tensor] = (),
    rgb_after: Sequence[int] = (),
    noise: Noise = None,
) -> tuple[Tensor, Tensor | None]:
    """The stack over `x [1 or B, I, H, W]`; returns features `[B, O, H, W]` and rgb `[B, 3, H, W]` (float32)
    or None."""
    batch = styles[0].shape[0]
    x = x.expand(batch, *x.shape[1:])
    height, width = x.shape[2:]
    rgb = None
    for layer, (weight, style, bias, strength) in enumerate(zip(weights, styles, biases, strengths)):
        y = _conv(x, modulate_as_published(weight, style, True))
        if isinstance(noise, Tensor):
            y = y + strength * noise[layer].reshape(batch, 1, height, width)
        elif noise == "fresh":
            y = y + strength * torch.randn(batch, 1, height, width, dtype=y.dtype, device=y.device)
        x = F.leaky_relu(y + bias.to(y.dtype)[:, None, None], SLOPE) * GAIN
        if layer in rgb_after:
            k = rgb_after.index(layer)
            colour = _conv(x, modulate_as_published(rgb_weights[k], rgb_styles[k], False)).to(
                rgb_weights[k].dtype
            )
            colour = colour + rgb_biases[k][:, None, None]
            rgb = colour if rgb is None else rgb + colour
    return x, rgb


def plain(
    x: Tensor,
    weights: Sequence[Tensor],
    styles: Sequence[Tensor],
    biases: Sequence[Tensor],
    strengths: Sequence[Tensor],
    rgb_weights: Sequence[Tensor] = (),
    rgb_styles: Sequence[Tensor] = (),
    rgb_biases: Sequence[Tensor] = (),
    rgb_after: Sequence[int] = (),
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formulas as they stand, pixels first, one eager operation after the other, each rounding to the dtype.

    Nobody's way to be fast: its error is the measure for all others (see `checks.py`). Shapes as in `bmm`.
    """
    x = x.expand(styles[0].shape[0], -1, -1)
    rgb = None
    for layer, (weight, style, bias, strength) in enumerate(zip(weights, styles, biases, strengths)):
        y = torch.bmm(x, modulate_as_published(weight, style).to(x.dtype).transpose(1, 2))
        if noise is not None:
            y = y + strength * noise[layer][:, :, None]
        x = F.leaky_relu(y + bias.to(y.dtype), SLOPE) * GAIN
        if layer in rgb_after:
            k = rgb_after.index(layer)
            projection = modulate_as_published(rgb_weights[k], rgb_styles[k], False).to(x.dtype)
            colour = torch.bmm(x, projection.transpose(1, 2)).to(rgb_weights[k].dtype) + rgb_biases[k]
            rgb = colour if rgb is None else rgb + colour
    return x, rgb


def bmm(
    x: Tensor,
    weights: Sequence[Tensor],
    styles: Sequence[Tensor],
    biases: Sequence[Tensor],
    strengths: Sequence[Tensor],
    rgb_weights: Sequence[Tensor] = (),
    rgb_styles: Sequence[Tensor] = (),
    rgb_biases: Sequence[Tensor] = (),
    rgb_after: Sequence[int] = (),
    noise: Noise = None,
    *,
    for_compiler: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The stack over `x [1 or B, P, I]`; returns features `[B, P, O]` and rgb `[B, P, 3]` (float32) or None.

    The gain moves through the leaky ReLU into weight, bias and strength: one pass less. Eager code adds noise
        and bias
    inside the matrix product (`baddbmm`) and activates in place; `for_compiler` leaves them to one generated
    kernel after the product, which is the cheaper form once a compiler fuses it.
    """
    batch, pixels = styles[0].shape[0], x.shape[1]
    x = x.expand(batch, -1, -1)
    rgb = None
    for layer, (weight, style, bias, strength) in enumerate(zip(weights, styles, biases, strengths)):
        modulated = modulate(weight, style, gain=GAIN).to(x.dtype).transpose(1, 2)
        offset = (bias * GAIN).to(x.dtype)
        if isinstance(noise, Tensor):
            offset = offset + (strength * GAIN) * noise[layer][:, :, None]
        elif noise == "fresh":
            drawn = torch.randn(batch, pixels, 1, dtype=x.dtype, device=x.device)
            offset = offset + (strength * GAIN) * drawn
        else:
            offset = offset[None, None]
        if for_compiler:
            x = F.leaky_relu(torch.bmm(x, modulated) + offset, SLOPE)
        else:
            x = F.leaky_relu_(torch.baddbmm(offset, x, modulated), SLOPE)
        if layer in rgb_after:
            k = rgb_after.index(layer)
            projection = modulate(rgb_weights[k], rgb_styles[k], demodulate=False).to(x.dtype)
            colour = torch.bmm(x, projection.transpose(1, 2)).to(rgb_weights[k].dtype) + rgb_biases[k]
            rgb = colour if rgb is None else rgb + colour
    return x, rgb
