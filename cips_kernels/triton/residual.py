"""Residual blocks between the layers' launches: `z = (y + skip(x)) / sqrt(2)`, and its backward.

The kernel of a block's last layer takes the factor in its gain, so that its output is `y / sqrt(2)`; what is left is
one addition of `x / sqrt(2)`, or one product that adds to it, `c W x / sqrt(2)`: PyTorch's own, summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Skip
from ..spec import SQRT_HALF
from . import layers


def _scale(skip: Skip) -> float:
    return SQRT_HALF * skip.in_features**-0.5


def add_skip(y: Tensor, x: Tensor, weight: Tensor | None, skip: Skip | None, out: Tensor) -> None:
    """`y + skip(x) / sqrt(2)` into `out` `[B, P, O]`, which may be `y`; `x` `[B or 1, P, I]`, `weight` `[O, I]` if any.
    """
    if weight is None or skip is None:
        torch.add(y, x, alpha=SQRT_HALF, out=out)
        return
    matrix = weight.to(x.dtype).t().expand(y.shape[0], -1, -1)
    torch.baddbmm(y, x.expand(y.shape[0], -1, -1), matrix, alpha=_scale(skip), out=out)


def add_skip_grad(h: Tensor, grad: Tensor, weight: Tensor | None, skip: Skip | None) -> None:
    """Add to `h` `[B or 1, P, I]` what `grad` `[B, P, O]`, that of the block's output, brings to the input of its first
    layer; summed over images where one input serves all."""
    if h.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True, dtype=torch.float32).to(grad.dtype)
    if weight is None or skip is None:
        h.add_(grad, alpha=SQRT_HALF)
        return
    h.baddbmm_(grad, weight.to(grad.dtype).expand(h.shape[0], -1, -1), alpha=_scale(skip))


def skip_wgrad(grad: Tensor, x: Tensor, skip: Skip) -> Tensor:
    """Gradient of a skip's matrix, `[O, I]` float32, from `grad` `[B, P, O]` and `x` `[B or 1, P, I]`."""
    batch = grad.shape[0]
    n = torch.empty((batch, skip.out_features, skip.in_features), dtype=torch.float32, device=x.device)
    layers.layer_wgrad(grad, x, n)
    return n.sum(0).mul_(_scale(skip))


def output_grad(
    u: Tensor | None, m: Tensor | None, drgb: Tensor | None, rgb_m: Tensor | None, grad: Tensor | None, like: Tensor
) -> Tensor:
    """Gradient `[B, P, C]`, contiguous, of what `like` is: `u m + dRGB R + grad`, each where there is one."""
    h = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if u is None and rgb_m is None:
        return h.zero_() if grad is None else h.copy_(grad)
    layers.input_dgrad(u, m, drgb, rgb_m, h, like.shape[0])
    return h if grad is None else h.add_(grad)
