"""The formulas of the specification, one layer or one block at a time, in plain PyTorch on `[B, P, C]` tensors.

`reference` joins them to a stack. Names follow the mathematics there: image b, pixel p, input channel j, output channel
i; `c = 1 / sqrt(I)`. Each is twice differentiable, the written-out backwards included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .activations import activate, activate_backward
from .spec import SQRT_HALF, accumulation_dtype

# --- the mapping network --------------------------------------------------------------------------------------------


def mapping(z: Tensor, weights: Tensor, biases: Tensor, *, negative_slope: float = 0.2) -> Tensor:
    """`functional.mapping` in plain PyTorch: `x = z rsqrt(mean(z^2) + 1e-8)`, then `x = lrelu(W_l x + b_l)`."""
    x = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-8)
    for weight, bias in zip(weights, biases):
        x = torch.nn.functional.leaky_relu(torch.addmm(bias, x, weight.t()), negative_slope)
    return x


# --- one modulated weight ------------------------------------------------------------------------------------------


def modulate(
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Modulated weights `M` of each image.

    Args:
        weight: `[O, I]`.
        style: `[B, I]`, the affine's output.
        demodulate: scale each row to unit norm (StyleGAN2's demodulation).
        eps: added to the squared norm.
        dtype: of the result; computed in float32 (float64 for float64) and rounded once.

    Returns:
        `[B, O, I]`.
    """
    out_dtype = dtype or weight.dtype
    compute = accumulation_dtype(weight.dtype)
    v = style.to(compute)[:, None, :] * (weight.to(compute) / math.sqrt(weight.shape[1]))
    if demodulate:
        v = v * torch.rsqrt(v.square().sum(-1, keepdim=True) + eps)
    return v.to(out_dtype)


def modulate_backward(
    grad: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` `[O, I]` and `style` `[B, I]` from `grad` = dL/dM = N `[B, O, I]`."""
    c = 1.0 / math.sqrt(weight.shape[1])
    dv = grad
    if demodulate:
        v = c * style[:, None, :] * weight
        d = torch.rsqrt(v.square().sum(-1, keepdim=True) + eps)
        m = d * v
        dv = d * (grad - m * (grad * m).sum(-1, keepdim=True))
    return c * torch.einsum("bj,bij->ij", style, dv), c * torch.einsum("ij,bij->bj", weight, dv)


# --- one layer, its weight already modulated ------------------------------------------------------------------------


def layer_sums(a: Tensor, bias: Tensor, noise: Tensor | None, noise_strength: Tensor) -> Tensor:
    """What a layer's activation reads: `y = a + nu n + b` of its product `a` `[B, P, O]`, `bias` `[O]`, `noise` `[B, P]` or
    None."""
    if noise is not None:
        a = a + (noise_strength * noise).to(a.dtype)[:, :, None]
    return a + bias.to(a.dtype)


def layer_backward(
    grad: Tensor, x: Tensor, out: Tensor, m: Tensor, negative_slope: float, gain: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one layer with a leaky ReLU from `grad` = dL/dx' `[B, P, O]`; only the sign of `out` is read.

    Returns:
        dL/dx `[B, P, I]`; N = dL/dM `[B, O, I]`; dL/db `[O]`; the sum over channels of dL/dy, `[B, P]`, from which
        follow dnu = sum n * rows and dn = nu * rows.
    """
    return sums_backward(activate_backward(grad, out, "lrelu", negative_slope, gain), x, m)


def sums_backward(u: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `layer_backward` returns, from `u` = dL/dy `[B, P, O]`."""
    wide = accumulation_dtype(u.dtype)
    return torch.matmul(u, m), torch.matmul(u.mT, x).to(wide), u.sum((0, 1), dtype=wide), u.sum(-1, dtype=wide)


def add_rgb(rgb: Tensor, a: Tensor, bias: Tensor) -> Tensor:
    """`rgb + a + r`, `a = R x`, summed in the dtype of `rgb`."""
    return rgb + a.to(rgb.dtype) + bias.to(rgb.dtype)


# --- residual blocks ------------------------------------------------------------------------------------------------


def residual(y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """The output of a block, `(y + skip(x)) / sqrt(2)`.

    Args:
        y: `[B, P, O]`, the output of the block's last layer, activation and gain included.
        x: `[B, P, I]`, the input of its first layer.
        weight: `[O, I]`, then `skip(x) = c W x`; None: `skip(x) = x`, where I = O.
    """
    return (y + (x if weight is None else torch.matmul(x, _skip_matrix(x, weight).mT))) * SQRT_HALF


def residual_backward(grad: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `y` `[B, P, O]`, `x` `[B, P, I]` and `weight` `[O, I]` (None without one) from `grad`, that of the
    block's output."""
    h = grad * SQRT_HALF
    if weight is None:
        return h, h, None
    wide = accumulation_dtype(x.dtype)
    n = torch.matmul(h.mT, x).to(wide).sum(0)
    return h, torch.matmul(h, _skip_matrix(x, weight)), n / math.sqrt(weight.shape[1])


def _skip_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """`c W`, rounded once to the dtype of `x`."""
    return (weight.to(accumulation_dtype(x.dtype)) / math.sqrt(weight.shape[1])).to(x.dtype)


# --- a style a pixel ------------------------------------------------------------------------------------------------


def modfc_per_pixel(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    *,
    demodulate: bool,
    negative_slope: float,
    gain: float,
    eps: float,
    activation: str = "lrelu",
) -> Tensor:
    """A layer whose style varies by pixel: `y = d * (c W (s * x))`, `d_pi = 1 / sqrt(sum_j (c W_ij s_pj)^2 + eps)`.

    Shapes: `x` `[B, P, I]`, `weight` `[O, I]`, `style` `[B, P, I]`, `noise` `[B, P]` -> `[B, P, O]`.
    """
    wide = accumulation_dtype(x.dtype)
    w = weight.to(wide) / math.sqrt(weight.shape[1])
    y = torch.matmul((style.to(wide) * x.to(wide)).to(x.dtype), w.to(x.dtype).mT)
    if demodulate:
        norm = torch.matmul(style.to(wide).square(), w.square().mT)
        y = y * torch.rsqrt(norm + eps).to(x.dtype)
    if noise is not None:
        strength = noise if noise_strength is None else noise_strength * noise
        y = y + strength.to(x.dtype)[:, :, None]
    if bias is not None:
        y = y + bias.to(x.dtype)
    return activate(y, activation, negative_slope, gain)


def blended_product(
    x: Tensor, weight: Tensor, styles: Tensor, blend: Tensor, *, demodulate: bool = True, eps: float = 1e-8
) -> Tensor:
    """The product of a layer whose style at pixel p is `s_p = sum_k blend_pk styles_k`: `a = d * (c W (s * x))`.

    The norm of a row, `sum_j (c W_ij s_pj)^2`, is a quadratic form in the K weights of the blend. Its coefficients
    `q_kl,i = sum_j (c W_ij)^2 s_kj s_lj`, of which K (K + 1) / 2 differ, are those of the image, so what a pixel adds
    to the work is small: nothing of size `[P, O, I]` is ever made.

        d_pi = 1 / sqrt(sum_{k <= l} m_kl blend_pk blend_pl q_kl,i + eps),     m_kl = 1 if k = l, otherwise 2

    Args:
        x: `[B, P, I]`.
        weight: `[O, I]`.
        styles: `[B, K, I]`.
        blend: `[P, K]` or `[B, P, K]`.
        demodulate, eps: as in `modulate`.

    Returns:
        `[B, P, O]` in the dtype of `x`; styles and d in float32 (float64 for float64).
    """
    wide = accumulation_dtype(x.dtype)
    w, styles, blend = weight.to(wide) / math.sqrt(weight.shape[1]), styles.to(wide), blend.to(wide)
    s = torch.matmul(blend, styles)
    a = torch.matmul((s * x.to(wide)).to(x.dtype), w.to(x.dtype).mT)
    if not demodulate:
        return a
    pairs = [(k, other) for k in range(styles.shape[1]) for other in range(k, styles.shape[1])]
    q = torch.matmul(torch.stack([styles[:, k] * styles[:, other] for k, other in pairs], 1), w.square().mT)
    factors = torch.stack([blend[..., k] * blend[..., other] * (1 if k == other else 2) for k, other in pairs], -1)
    # a sum of squares, but terms of either sign: where styles cancel, rounding could leave it below zero
    return a * torch.rsqrt(torch.matmul(factors, q).clamp_min(0) + eps).to(x.dtype)
