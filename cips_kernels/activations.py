"""What a layer does to its sums y `[..., C]`, channels last: each activation with its derivative, in plain PyTorch.

    lrelu      g lrelu(y)
    linear     g y, which is a leaky ReLU of slope 1
    sin        g sin(y)
    sinrelu    g [lrelu(y_0), lrelu(y_2), ..., sin(y_1), sin(y_3), ...], which puts the even channels first

The sines are those of the official CIPS code (`activation='sin'`, `'sinrelu'`), whose gain is 1 for `sin` and sqrt(2) for
the others. The sign of a leaky ReLU's output tells its derivative; a sine's output does not, so its backward reads y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATIONS = ("lrelu", "linear", "sin", "sinrelu")
SQRT2 = math.sqrt(2.0)


def resolve_activation(activation: str, negative_slope: float, gain: float | None) -> tuple[str, float, float]:
    """Kind ("lrelu", "sin" or "sinrelu"), slope and gain of a named activation; a gain of None is the official one.

    Raises:
        ValueError: no activation is called so.
    """
    if activation not in ACTIVATIONS:
        expected = f"{', '.join(map(repr, ACTIVATIONS[:-1]))} or {ACTIVATIONS[-1]!r}"
        raise ValueError(f"activation: expected {expected}, got {activation!r}")
    gain = (1.0 if activation == "sin" else SQRT2) if gain is None else gain
    return ("lrelu", 1.0, gain) if activation == "linear" else (activation, negative_slope, gain)


def leaky_relu(y: Tensor, negative_slope: float, gain: float) -> Tensor:
    """`gain * y` where y is positive, `gain * negative_slope * y` elsewhere."""
    return gain * torch.where(y > 0, y, negative_slope * y)


def activate(y: Tensor, kind: str, negative_slope: float, gain: float) -> Tensor:
    """The output of an activation of `kind` as `resolve_activation` names it, in the shape and dtype of `y`."""
    if kind == "lrelu":
        return leaky_relu(y, negative_slope, gain)
    if kind == "sin":
        return gain * torch.sin(y)
    halves = leaky_relu(y[..., ::2], negative_slope, 1.0), torch.sin(y[..., 1::2])
    return gain * torch.cat(halves, -1)


def activate_backward(grad: Tensor, y: Tensor, kind: str, negative_slope: float, gain: float) -> Tensor:
    """dL/dy from `grad`, the gradient of the output; written out, and differentiable itself."""
    if kind == "lrelu":
        return gain * torch.where(y > 0, grad, negative_slope * grad)
    if kind == "sin":
        return gain * grad * torch.cos(y)
    channels = y.shape[-1]
    even = (channels + 1) // 2
    positive = y[..., ::2] > 0
    steps = torch.where(positive, grad[..., :even], negative_slope * grad[..., :even])
    waves = grad[..., even:] * torch.cos(y[..., 1::2])
    # back to the order of y: channel 2 k came from place k, channel 2 k + 1 from place even + k
    place = torch.arange(channels, device=y.device)
    place = torch.where(place % 2 == 0, place // 2, even + place // 2)
    return gain * torch.cat((steps, waves), -1).index_select(-1, place)
