"""What stands between the convolutions of a discriminator: bias, leaky ReLU, low-pass filter and stride, in one pass each.

    blur            lrelu(x + bias) or x, filtered by [1,3,3,1] x [1,3,3,1] / 64, every stride-th pixel
    bias_lrelu      lrelu(x + bias) (+ residual)

In bfloat16 and channels-last, cuDNN's depthwise convolution takes longer than all matrix products of StyleGAN2's
discriminator together; as a Triton kernel the filter moves every element once. Four operators, registered with
PyTorch, are the whole of it: each backward is an operator again whose derivative is the forward one (see
`filter_formulas`), so that a gradient penalty can be differentiated as often as one likes.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from . import filter_formulas as formulas
from .arguments import COMPUTE_DTYPES, expect_parameter, expect_shape
from .backends import resolve
from .filter_formulas import TAPS, blurred_size, empty_plane
from .ops import operator_context
from .spec import accumulation_dtype

STRIDES = (1, 2)
_library = torch.library.Library("cips_kernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
for _schema in (
    "blur(Tensor x, Tensor? mask, Tensor? bias, int padding, int stride, float slope, bool activate, str backend) -> Tensor",
    "blur_transposed(Tensor grad, Tensor? mask, Tensor? bias, int height, int width, int padding, int stride, float slope,"
    " bool sums, str backend) -> (Tensor grad, Tensor sums)",
    "bias_lrelu(Tensor x, Tensor bias, Tensor? residual, float slope, str backend) -> Tensor",
    "bias_lrelu_backward(Tensor grad, Tensor mask, Tensor? bias, float slope, bool sums, str backend)"
    " -> (Tensor grad, Tensor sums)",
):
    _library.define(_schema, tags=_TAGS)


# --- the public functions -------------------------------------------------------------------------------------------


def serves(x: Tensor) -> bool:
    """Whether a kernel of ours serves `x` (a tensor that flows into a convolution) where nothing else is asked for:
    channels-last, and on a device and in a dtype of the `triton` backend."""
    if x.dim() != 4 or not x.numel() or x.dtype not in COMPUTE_DTYPES or x.dtype == torch.float64:
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return resolve("auto", x.device, x.dtype) in ("triton", "cuda")


def blur(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int,
    stride: int = 1,
    negative_slope: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Low-pass filter [1,3,3,1] x [1,3,3,1] / 64 and stride; before it, where a slope is given, the leaky ReLU.

    Args:
        x: `[B, C, H, W]`, floating; sums are in float32 (float64 for float64), rounded once.
        bias: `[C]`, added first, in the dtype of `x` or float32; only with a slope.
        padding: zeros on every side, behind the activation; 0 to 3.
        stride: of the result, 1 or 2.
        negative_slope: of the leaky ReLU; None: none.
        backend: "auto" (Triton for channels-last tensors on a GPU, PyTorch otherwise), "triton", "reference".

    Returns:
        `[B, C, H', W']` with H' = (H + 2 padding - 4) // stride + 1, in the dtype and memory format of `x`. Differentiable
        any number of times.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for cannot serve.
    """
    expect_shape("x", x, (None,) * 4, "[B, C, H, W]")
    _expect_floating(x)
    if stride not in STRIDES:
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    if not isinstance(padding, int) or not 0 <= padding < TAPS:
        raise ValueError(f"padding: expected an integer from 0 to {TAPS - 1}, got {padding!r}")
    if min(x.shape[2:]) + 2 * padding < TAPS:
        raise ValueError(f"x: expected at least {TAPS - 2 * padding} rows and columns, got {list(x.shape)}")
    if bias is not None:
        if negative_slope is None:
            raise ValueError("bias: expected None where no negative_slope is given")
        _expect_bias(bias, x)
    slope = 1.0 if negative_slope is None else _slope(negative_slope)
    name = _resolve(backend, x)
    return torch.ops.cips_kernels.blur(x, None, bias, padding, stride, slope, negative_slope is not None, name)


def bias_lrelu(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    negative_slope: float = 0.2,
    backend: str = "auto",
) -> Tensor:
    """A convolution's tail in one pass: `lrelu(x + bias) (+ residual)`.

    Args:
        x: `[B, C, H, W]`, floating; computed in float32 (float64 for float64), rounded once.
        bias: `[C]`, in the dtype of `x` or float32.
        residual: as `x`, or None.
        negative_slope: at least 0.
        backend: as in `blur`.

    Returns:
        `[B, C, H, W]` in the dtype of `x`, channels-last. Differentiable any number of times.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for cannot serve.
    """
    expect_shape("x", x, (None,) * 4, "[B, C, H, W]")
    _expect_floating(x)
    _expect_bias(bias, x)
    if residual is not None:
        expect_shape("residual", residual, x.shape, "[B, C, H, W]")
        if residual.dtype != x.dtype or residual.device != x.device:
            raise TypeError(f"residual: expected {x.dtype} on {x.device}, got {residual.dtype} on {residual.device}")
    slope = _slope(negative_slope)
    return torch.ops.cips_kernels.bias_lrelu(x, bias, residual, slope, _resolve(backend, x))


def _expect_floating(x: Tensor) -> None:
    if x.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def _expect_bias(bias: Tensor, x: Tensor) -> None:
    expect_shape("bias", bias, (x.shape[1],), "[C]")
    expect_parameter("bias", bias, x)


def _slope(negative_slope: float) -> float:
    # a negative one would not let the sign of the result tell that of the argument
    if not 0 <= negative_slope < float("inf"):
        raise ValueError(f"negative_slope: expected a finite number of at least 0, got {negative_slope!r}")
    return float(negative_slope)


def _resolve(backend: str, x: Tensor) -> str:
    """"triton" or "reference"."""
    if backend == "auto" and not serves(x):
        return "reference"
    name = resolve(backend, x.device, x.dtype)
    return "triton" if name in ("triton", "cuda") and x.numel() else "reference"


# --- the operators --------------------------------------------------------------------------------------------------


def _kernels():
    return importlib.import_module(".triton.filters", __package__)


def _activated(x: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    y = formulas.add_bias(x, bias)
    return y * torch.where(y > 0, 1.0, slope)


def _in_form_of(like: Tensor, y: Tensor) -> Tensor:
    return empty_plane(like, *y.shape[2:]).copy_(y)


def _blur(x, mask, bias, padding, stride, slope, activate, backend) -> Tensor:
    with operator_context(x.device):
        if backend == "triton":
            return _kernels().blur(x, mask, bias, padding, stride, slope, activate)
        y = x.to(accumulation_dtype(x.dtype))
        if activate:
            y = _activated(y, bias, slope)
        elif mask is not None:
            y = y * formulas.lrelu_slope(mask, bias, slope)
        return _in_form_of(x, formulas.blur(y, padding, stride))


def _blur_fake(x, mask, bias, padding, stride, slope, activate, backend) -> Tensor:
    return empty_plane(x, blurred_size(x.shape[2], padding, stride), blurred_size(x.shape[3], padding, stride))


def _blur_setup(ctx, inputs, output) -> None:
    x, mask, bias, padding, stride, slope, activate, backend = inputs
    ctx.save_for_backward(x if activate else mask, bias)
    ctx.activate, ctx.backend = activate and bias is not None, backend
    ctx.options = (*x.shape[2:], padding, stride, slope)


def _blur_autograd(ctx, grad):
    mask, bias = ctx.saved_tensors
    sums = ctx.activate and ctx.needs_input_grad[2]
    dx, db = torch.ops.cips_kernels.blur_transposed(grad, mask, bias, *ctx.options, sums, ctx.backend)
    return dx, None, db.to(bias.dtype) if sums else None, None, None, None, None, None


def _blur_transposed(grad, mask, bias, height, width, padding, stride, slope, sums, backend) -> tuple[Tensor, Tensor]:
    with operator_context(grad.device):
        if backend == "triton":
            return _kernels().blur_transposed(grad, mask, bias, height, width, padding, stride, slope, sums)
        wide = grad.to(accumulation_dtype(grad.dtype))
        dx = formulas.blur_transposed(wide, height, width, padding, stride)
        if mask is not None:
            dx = dx * formulas.lrelu_slope(mask, bias, slope)
        return _in_form_of(grad, dx), _sums(dx, sums)


def _sums(dx: Tensor, wanted: bool) -> Tensor:
    """A bias's gradient, in the accumulation dtype, or nothing."""
    return dx.sum((0, 2, 3)) if wanted else dx.new_empty(0)


def _sums_fake(grad: Tensor, wanted: bool) -> Tensor:
    return grad.new_empty(grad.shape[1] if wanted else 0, dtype=accumulation_dtype(grad.dtype))


def _with_sums(grad: Tensor | None, grad_sums: Tensor | None, like: Tensor) -> Tensor:
    """What a backward that returns a tensor and its sums hands back to that tensor."""
    if grad is None:
        grad = like.new_zeros(()).expand(like.shape)
    if grad_sums is None or not grad_sums.numel():
        return grad
    return (grad + grad_sums[:, None, None]).to(grad.dtype)


def _blur_transposed_fake(grad, mask, bias, height, width, padding, stride, slope, sums, backend):
    return empty_plane(grad, height, width), _sums_fake(grad, sums)


def _blur_transposed_setup(ctx, inputs, output) -> None:
    grad, mask, bias, height, width, padding, stride, slope, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, bias)
    ctx.like = grad.new_empty(()).expand(*grad.shape[:2], height, width)
    ctx.options = (padding, stride, slope, False, backend)


def _blur_transposed_autograd(ctx, grad, grad_sums):
    # the slope is constant wherever it has a derivative
    grad = _with_sums(grad, grad_sums, ctx.like)
    return (torch.ops.cips_kernels.blur(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 9)


def _bias_lrelu(x, bias, residual, slope, backend) -> Tensor:
    with operator_context(x.device):
        if backend == "triton":
            return _kernels().bias_lrelu(x, bias, residual, slope)
        y = _activated(x.to(accumulation_dtype(x.dtype)), bias, slope)
        return _channels_last(x).copy_(y if residual is None else y + residual)


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _bias_lrelu_setup(ctx, inputs, output) -> None:
    x, bias, residual, slope, backend = inputs
    # the result's sign is the argument's, so that the argument need not be kept
    ctx.save_for_backward(*((output, None) if residual is None else (x, bias)))
    ctx.bias_dtype, ctx.residual, ctx.options = bias.dtype, residual is not None, (slope, backend)


def _bias_lrelu_autograd(ctx, grad):
    sums = ctx.needs_input_grad[1]
    slope, backend = ctx.options
    dx, db = torch.ops.cips_kernels.bias_lrelu_backward(grad, *ctx.saved_tensors, slope, sums, backend)
    return dx, db.to(ctx.bias_dtype) if sums else None, grad if ctx.residual else None, None, None


def _bias_lrelu_backward(grad, mask, bias, slope, sums, backend) -> tuple[Tensor, Tensor]:
    with operator_context(grad.device):
        if backend == "triton":
            return _kernels().bias_lrelu_backward(grad, mask, bias, slope, sums)
        dx = grad.to(accumulation_dtype(grad.dtype)) * formulas.lrelu_slope(mask, bias, slope)
        return _channels_last(grad).copy_(dx), _sums(dx, sums)


def _bias_lrelu_backward_setup(ctx, inputs, output) -> None:
    grad, mask, bias, slope, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, bias)
    ctx.like = grad.new_empty(()).expand(grad.shape)
    ctx.options = (slope, False, backend)


def _bias_lrelu_backward_autograd(ctx, grad, grad_sums):
    grad = _with_sums(grad, grad_sums, ctx.like)
    return (torch.ops.cips_kernels.bias_lrelu_backward(grad, *ctx.saved_tensors, *ctx.options)[0], *(None,) * 5)


for _name, _impl, _fake, _setup, _backward in (
    ("blur", _blur, _blur_fake, _blur_setup, _blur_autograd),
    ("blur_transposed", _blur_transposed, _blur_transposed_fake, _blur_transposed_setup, _blur_transposed_autograd),
    ("bias_lrelu", _bias_lrelu, lambda x, *_: _channels_last(x), _bias_lrelu_setup, _bias_lrelu_autograd),
    (
        "bias_lrelu_backward", _bias_lrelu_backward,
        lambda grad, mask, bias, slope, sums, backend: (_channels_last(grad), _sums_fake(grad, sums)),
        _bias_lrelu_backward_setup, _bias_lrelu_backward_autograd,
    ),
):  # fmt: skip
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cips_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"cips_kernels::{_name}", _backward, setup_context=_setup, lib=_library)
