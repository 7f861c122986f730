"""A convolution whose second derivatives are convolutions of the same size.

PyTorch's own second derivative by the weight is a convolution with the gradient of the output as its kernel, as large as
the image, which takes many times as long as everything else in R1's step. Here the three products of a convolution (result,
gradient of the input, gradient of the weight) are operators whose derivatives are one another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["conv2d"]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """`F.conv2d`, made for gradient penalties; differentiable any number of times.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I / groups, k, k]`, in the dtype of `x`.
        bias: `[O]`, or None.
        stride, padding: the same in both directions.
        groups: as in `F.conv2d`.

    Returns:
        `[B, O, H', W']` with H' = (H + 2 padding - k) // stride + 1.
    """
    return _Result.apply(x, weight, bias, stride, padding, groups)


class _Result(Function):
    """y = W * x + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, *ctx.options = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        return (
            _InputGradient.apply(grad, weight, tuple(x.shape), *ctx.options) if wants[0] else None,
            _WeightGradient.apply(grad, x, tuple(weight.shape), *ctx.options) if wants[1] else None,
            grad.sum((0, 2, 3)) if wants[2] else None,
            None,
            None,
            None,
        )


class _InputGradient(Function):
    """dx of a dy: linear in dy and W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, shape: tuple[int, ...], stride: int, padding: int, groups: int) -> Tensor:
        # rows and columns that no window reaches
        rest = [
            size + 2 * padding - kernel - stride * (made - 1)
            for size, kernel, made in zip(shape[2:], weight.shape[2:], grad.shape[2:])
        ]
        return F.conv_transpose2d(grad, weight, stride=stride, padding=padding, output_padding=rest, groups=groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, weight, _, *ctx.options = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple:
        grad, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        return (
            _Result.apply(second, weight, None, *ctx.options) if wants[0] else None,
            _WeightGradient.apply(grad, second, tuple(weight.shape), *ctx.options) if wants[1] else None,
            None,
            None,
            None,
            None,
        )


class _WeightGradient(Function):
    """dW of a dy: linear in dy and x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, shape: tuple[int, ...], stride: int, padding: int, groups: int) -> Tensor:
        form = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        like = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
        options = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
        return torch.ops.aten.convolution_backward(grad, x, like, None, *options, (False, True, False))[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, x, _, *ctx.options = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple:
        grad, x = ctx.saved_tensors
        wants = ctx.needs_input_grad
        return (
            _Result.apply(x, second, None, *ctx.options) if wants[0] else None,
            _InputGradient.apply(grad, second, tuple(x.shape), *ctx.options) if wants[1] else None,
            None,
            None,
            None,
            None,
        )
