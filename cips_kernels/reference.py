"""The specification: the modulated fully-connected stack in plain PyTorch, forward and written-out backward.

Every other backend is measured against this page. It runs on any device in any floating dtype, and every function is
twice differentiable, the written-out backwards included. Names follow DESIGN section 2: image b, pixel p, input channel
j, output channel i; `c = 1 / sqrt(I)`.

    V_ij = c s_j W_ij          d_i = 1 / sqrt(sum_j V_ij^2 + eps)          M_ij = d_i V_ij
    y_pi = sum_j M_ij x_pj + nu n_p + b_i              x'_pi = g lrelu(y_pi)
    rgb_p += R_b x'_p + r                              R modulated, not demodulated
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise as counter_noise
from .arguments import (
    Noise,
    activation_slope,
    as_compute,
    check_coords,
    from_pixels,
    infer_layout,
    skip_to_pixels,
    split_noise,
    stack_call,
    to_pixels,
)
from .packing import activation, empty_activations
from .spec import (
    Needs,
    StackGrads,
    StackInputs,
    StackSaved,
    StackSpec,
    accumulation_dtype,
    empty_like_layout,
    is_channel_major,
)

SQRT2 = math.sqrt(2.0)


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


def leaky_relu(y: Tensor, negative_slope: float, gain: float) -> Tensor:
    """`gain * y` where y is positive, `gain * negative_slope * y` elsewhere."""
    return gain * torch.where(y > 0, y, negative_slope * y)


def layer_forward(
    x: Tensor, m: Tensor, bias: Tensor, noise: Tensor | None, noise_strength: Tensor, negative_slope: float, gain: float
) -> Tensor:
    """One layer: `x` `[B, P, I]`, `m` `[B, O, I]`, `bias` `[O]`, `noise` `[B, P]` or None -> `[B, P, O]`."""
    y = torch.matmul(x, m.mT)
    if noise is not None:
        y = y + (noise_strength * noise).to(x.dtype)[:, :, None]
    return leaky_relu(y + bias.to(x.dtype), negative_slope, gain)


def layer_backward(
    grad: Tensor, x: Tensor, out: Tensor, m: Tensor, negative_slope: float, gain: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one layer from `grad` = dL/dx' `[B, P, O]`; only the sign of `out` is read.

    Returns:
        dL/dx `[B, P, I]`; N = dL/dM `[B, O, I]`; dL/db `[O]`; the sum over channels of dL/dy, `[B, P]`, from which
        follow dnu = sum n * rows and dn = nu * rows.
    """
    u = gain * torch.where(out > 0, grad, negative_slope * grad)
    wide = accumulation_dtype(u.dtype)
    return torch.matmul(u, m), torch.matmul(u.mT, x).to(wide), u.sum((0, 1), dtype=wide), u.sum(-1, dtype=wide)


# --- the stack on flat tensors --------------------------------------------------------------------------------------


def layer_noise(inputs: StackInputs, spec: StackSpec, layer: int) -> Tensor | None:
    """Noise `[B, P]` of one layer, or None where noise is off."""
    if inputs.noise is not None:
        return inputs.noise[layer]
    if inputs.seed is None:
        return None
    number = spec.first_layer + layer
    noise = counter_noise.normal(inputs.seed, number, inputs.batch, inputs.pixels, inputs.coords)
    return noise.to(accumulation_dtype(inputs.x.dtype))


def modulate_all(inputs: StackInputs, spec: StackSpec) -> list[Tensor]:
    """Modulated weights of every matrix, layers then ToRGBs, in the dtype of `x`."""
    packing = spec.packing(inputs.batch)
    return [
        modulate(
            packing.weight(inputs.weights, matrix),
            packing.style(inputs.styles, matrix),
            demodulate=matrix.demodulate,
            eps=spec.eps,
            dtype=inputs.x.dtype,
        )
        for matrix in packing.matrices
    ]


def modulate_all_backward(
    grad_mods: Sequence[Tensor], inputs: StackInputs, spec: StackSpec
) -> tuple[Tensor, Tensor]:
    """Flat gradients of all weights and styles from N of every matrix."""
    packing = spec.packing(inputs.batch)
    pairs = [
        modulate_backward(
            grad,
            packing.weight(inputs.weights, matrix),
            packing.style(inputs.styles, matrix),
            demodulate=matrix.demodulate,
            eps=spec.eps,
        )
        for grad, matrix in zip(grad_mods, packing.matrices)
    ]
    return torch.cat([w.reshape(-1) for w, _ in pairs]), torch.cat([s for _, s in pairs], 1)


def add_rgb(rgb: Tensor, x: Tensor, m: Tensor, bias: Tensor) -> Tensor:
    """`rgb + R x + r`, summed in the dtype of `rgb`."""
    return rgb + torch.matmul(x, m.mT).to(rgb.dtype) + bias.to(rgb.dtype)


def stack_layers(inputs: StackInputs, spec: StackSpec, mods: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Outputs of every layer, and the RGB sum `[B, P, C]`."""
    packing = spec.packing(inputs.batch)
    x = inputs.x.expand(inputs.batch, -1, -1)
    wide = accumulation_dtype(x.dtype)
    rgb = x.new_zeros((x.shape[0], x.shape[1], spec.rgb_channels if spec.rgb_after else 0), dtype=wide)
    if inputs.skip is not None:
        rgb = rgb + inputs.skip.to(wide)
    outputs = []
    for layer in range(-1, spec.depth):
        if layer >= 0:
            x = layer_forward(
                x,
                mods[layer],
                packing.bias(inputs.biases, packing.layers[layer]),
                layer_noise(inputs, spec, layer),
                inputs.noise_strengths[layer],
                spec.negative_slope,
                spec.gain,
            )
            outputs.append(x)
        for k in spec.rgbs_after(layer):
            rgb = add_rgb(rgb, x, mods[spec.depth + k], packing.bias(inputs.biases, packing.rgbs[k]))
    return outputs, rgb


def stack_gradients(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    outputs: Sequence[Tensor],
    mods: Sequence[Tensor],
) -> StackGrads:
    """The written-out backward of the stack: every gradient, from the outputs' gradients and the layers' outputs."""
    packing = spec.packing(inputs.batch)
    x0 = inputs.x.expand(inputs.batch, -1, -1)
    wide = accumulation_dtype(x0.dtype)
    narrow_rgb = None if grad_rgb is None else grad_rgb.to(x0.dtype)
    grad_mods: list[Tensor | None] = [None] * len(packing.matrices)
    grad_biases: list[Tensor] = [x0.new_zeros(m.out_features, dtype=wide) for m in packing.matrices]
    grad_strengths: list[Tensor] = []
    grad_noises: list[Tensor] = []
    h = grad_features
    for layer in range(spec.depth - 1, -2, -1):
        out = outputs[layer] if layer >= 0 else x0
        for k in spec.rgbs_after(layer):
            if narrow_rgb is None or grad_rgb is None:
                continue
            index = spec.depth + k
            step = torch.matmul(narrow_rgb, mods[index])
            h = step if h is None else h + step
            grad_mods[index] = torch.matmul(narrow_rgb.mT, out).to(wide)
            grad_biases[index] = grad_rgb.sum((0, 1), dtype=wide)
        if layer < 0:
            break
        if h is None:
            h = torch.zeros_like(out)
        source = outputs[layer - 1] if layer > 0 else x0
        h, grad_mods[layer], grad_biases[layer], rows = layer_backward(
            h, source, out, mods[layer], spec.negative_slope, spec.gain
        )
        n = layer_noise(inputs, spec, layer)
        grad_strengths.append(rows.new_zeros(()) if n is None else (rows * n).sum())
        grad_noises.append(rows * inputs.noise_strengths[layer])
    filled = [
        x0.new_zeros((inputs.batch, m.out_features, m.in_features), dtype=wide) if g is None else g
        for g, m in zip(grad_mods, packing.matrices)
    ]
    grad_weights, grad_styles = modulate_all_backward(filled, inputs, spec)
    grad_x = torch.zeros_like(x0) if h is None else h
    if inputs.x.shape[0] != inputs.batch:
        grad_x = grad_x.sum(0, keepdim=True)
    grad_noise = None
    if inputs.noise is not None:
        grad_noise = torch.stack(grad_noises[::-1]) if grad_noises else torch.zeros_like(inputs.noise)
    return StackGrads(
        grad_x,
        grad_weights,
        grad_styles,
        torch.cat(grad_biases),
        torch.stack(grad_strengths[::-1]) if grad_strengths else inputs.noise_strengths.new_zeros(0),
        grad_noise,
    )


# --- the backend interface ------------------------------------------------------------------------------------------


def _in_order_of(x: Tensor, y: Tensor) -> Tensor:
    """`y` `[B, P, C]` in the memory order of `x`, which the operators promise."""
    if is_channel_major(x):
        return empty_like_layout(x, y.shape[0], y.shape[2], y.dtype).copy_(y)
    return y.contiguous()


def forward(inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call: the last layer's features, the RGB sum, and what the backward needs."""
    x, batch, pixels = inputs.x, inputs.batch, inputs.pixels
    mods = modulate_all(inputs, spec)
    outputs, rgb = stack_layers(inputs, spec, mods)
    rgb = _in_order_of(x, rgb)
    features = x.new_empty(0)
    if outputs and (want_features or save):
        features = _in_order_of(x, outputs[-1])
    activations, flat_mods = x.new_empty(0), x.new_empty(0)
    if save:
        activations = empty_activations(x, spec.widths, batch, pixels)
        for layer in range(spec.depth - 1):
            activation(activations, spec.widths, batch, pixels, layer).copy_(outputs[layer])
        packing = spec.packing(batch)
        flat_mods = x.new_zeros(packing.mod_numel)
        for matrix, m in zip(packing.matrices, mods):
            packing.mod(flat_mods, matrix).copy_(m)
    return features, rgb, StackSaved(features, activations, flat_mods)


def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    saved: StackSaved,
    needs: Needs,
) -> StackGrads:
    """Serve a backward call."""
    batch, pixels = inputs.batch, inputs.pixels
    packing = spec.packing(batch)
    outputs = [activation(saved.activations, spec.widths, batch, pixels, i) for i in range(spec.depth - 1)]
    outputs += [saved.features] if spec.depth else []
    mods = [packing.mod(saved.mods, matrix) for matrix in packing.matrices]
    grads = stack_gradients(grad_features, grad_rgb, inputs, spec, outputs, mods)
    return grads if grads.x is None else grads._replace(x=_in_order_of(inputs.x, grads.x))


def differentiable_backward(
    grad_features: Tensor | None, grad_rgb: Tensor | None, inputs: StackInputs, spec: StackSpec
) -> StackGrads:
    """The backward as a differentiable function of its inputs, layers' outputs recomputed: the second order of every
    backend differentiates this."""
    mods = modulate_all(inputs, spec)
    outputs, _ = stack_layers(inputs, spec, mods)
    return stack_gradients(grad_features, grad_rgb, inputs, spec, outputs, mods)


# --- the public signatures, served by plain autograd ----------------------------------------------------------------


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
    return leaky_relu(y, negative_slope, gain)


def modfc_stack(x: Tensor, *args: Sequence, layout: str | None = None, skip: Tensor | None = None, **options) -> tuple[Tensor | None, Tensor | None]:
    """`functional.modfc_stack` in plain PyTorch, differentiated by autograd: same arguments, no backend."""
    first = args[0][0] if len(args[0]) else args[4][0]
    x, name = as_compute(x), infer_layout(x, first.shape[1], layout)
    inputs, spec = stack_call(to_pixels(x, name), *args, skip=skip_to_pixels(skip, name, x), **options)
    outputs, rgb = stack_layers(inputs, spec, modulate_all(inputs, spec))
    features = from_pixels(outputs[-1], name, x) if outputs else None
    return features, from_pixels(rgb, name, x) if spec.rgb_after else None


def modfc(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    noise: Noise = None,
    noise_strength: Tensor | None = None,
    *,
    demodulate: bool = True,
    activation: str = "lrelu",
    negative_slope: float = 0.2,
    gain: float = SQRT2,
    eps: float = 1e-8,
    layout: str | None = None,
    coords: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """`functional.modfc` in plain PyTorch, differentiated by autograd: same arguments, no backend."""
    x, name = as_compute(x), infer_layout(x, weight.shape[1], layout)
    slope = activation_slope(activation, negative_slope)
    options = dict(demodulate=demodulate, negative_slope=slope, gain=gain, eps=eps)
    pixels = to_pixels(x, name)
    if style.dim() == 3:
        seed, given = split_noise(noise, 1, x.shape[0], pixels)
        n = given[0] if given is not None else None
        if seed is not None:
            n = counter_noise.normal(seed, layer, x.shape[0], pixels.shape[1], check_coords(coords, x.shape[0], pixels))
            n = n.to(accumulation_dtype(x.dtype))
        return from_pixels(modfc_per_pixel(pixels, weight, style, bias, n, noise_strength, **options), name, x)
    inputs, spec = stack_call(
        pixels, [weight], [style], [bias], [noise_strength],
        noise=noise, coords=coords, first_layer=layer, single=True, **options,
    )  # fmt: skip
    outputs, _ = stack_layers(inputs, spec, modulate_all(inputs, spec))
    return from_pixels(outputs[-1], name, x)


def to_rgb(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    layout: str | None = None,
) -> Tensor:
    """`functional.to_rgb` in plain PyTorch, differentiated by autograd: same arguments, no backend."""
    x, name = as_compute(x), infer_layout(x, weight.shape[1], layout)
    pixel_skip = skip_to_pixels(skip, name, x)
    inputs, spec = stack_call(to_pixels(x, name), [], [], [], [], [weight], [style], [bias], [-1], pixel_skip, single=True)
    return from_pixels(stack_layers(inputs, spec, modulate_all(inputs, spec))[1], name, x)
