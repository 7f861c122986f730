"""The specification: the modulated fully-connected stack in plain PyTorch, forward and written-out backward.

Every other backend is measured against this page. It runs on any device in any floating dtype, and every function is
twice differentiable, the written-out backwards included. Names follow DESIGN section 2: image b, pixel p, input channel
j, output channel i; `c = 1 / sqrt(I)`.

    V_ij = c s_j W_ij          d_i = 1 / sqrt(sum_j V_ij^2 + eps)          M_ij = d_i V_ij
    y_pi = sum_j M_ij x_pj + nu n_p + b_i              x'_pi = g lrelu(y_pi), or a sine: see `activations`
    rgb_p += R_b x'_p + r                              R modulated, not demodulated
    z = (x'_last + skip(x_first)) / sqrt(2)            where a residual block of layers first..last ends

`formulas` has each line by itself; here they are joined to a stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import noise as counter_noise
from .activations import activate, activate_backward, resolve_activation
from .arguments import (
    Noise,
    as_compute,
    check_coords,
    from_pixels,
    infer_layout,
    skip_to_pixels,
    split_noise,
    stack_call,
    to_pixels,
)
from .formulas import (
    add_rgb,
    blended_product,
    layer_backward,
    layer_sums,
    mapping,
    modfc_per_pixel,
    modulate,
    modulate_backward,
    residual,
    residual_backward,
    sums_backward,
)
from .packing import activation, empty_activations, summand
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

__all__ = [
    "backward", "differentiable_backward", "forward", "layer_backward", "mapping", "modfc", "modfc_stack", "modulate",
    "modulate_backward", "to_rgb",
]  # fmt: skip

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
    """Modulated weights of every matrix, layers then ToRGBs, in the dtype of `x`; none where styles are blended."""
    if inputs.blend is not None:
        return []
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


def skip_weight(inputs: StackInputs, spec: StackSpec, block: int) -> Tensor | None:
    """`[O, I]` of a residual block's skip, None where it is the identity."""
    packing = spec.packing(inputs.batch)
    matrix = packing.skips[block]
    return None if matrix is None else packing.weight(inputs.weights, matrix)


def modulate_all_backward(
    grad_mods: Sequence[Tensor], inputs: StackInputs, spec: StackSpec
) -> tuple[Tensor, Tensor]:
    """Flat gradients of all modulated weights and of the styles from N of every matrix."""
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


class StackOutputs(NamedTuple):
    """What a stack computes on the way.

    Attributes:
        outputs: of every layer, `[B, P, O_l]`; in the place of a residual block's last layer the block's.
        summands: for each block what its last layer gave before the addition.
        rgb: the RGB sum `[B, P, C]`.
        sums: of every layer what its activation read, where that is a sine; otherwise none.
    """

    outputs: list[Tensor]
    summands: list[Tensor]
    rgb: Tensor
    sums: list[Tensor]


def join_block(
    out: Tensor, layer: int, x0: Tensor, outputs: Sequence[Tensor], inputs: StackInputs, spec: StackSpec
) -> Tensor:
    """What is read after `layer`: its output `out`, or that of the residual block that ends with it. `x0` `[B, P, I]`, and
    the outputs of the layers before."""
    block = spec.block_to(layer)
    if block is None:
        return out
    first = spec.blocks[block][0]
    return residual(out, outputs[first - 1] if first else x0, skip_weight(inputs, spec, block))


def stack_layers(inputs: StackInputs, spec: StackSpec, mods: Sequence[Tensor]) -> StackOutputs:
    """Every layer and the RGB sum, from the modulated weights of `modulate_all`."""
    packing = spec.packing(inputs.batch)

    def product(index: int, x: Tensor) -> Tensor:
        if inputs.blend is None:
            return torch.matmul(x, mods[index].mT)
        matrix = packing.matrices[index]
        weight, styles = packing.weight(inputs.weights, matrix), packing.style(inputs.styles, matrix)
        return blended_product(x, weight, styles, inputs.blend, demodulate=matrix.demodulate, eps=spec.eps)

    x = inputs.x.expand(inputs.batch, -1, -1)
    wide = accumulation_dtype(x.dtype)
    rgb = x.new_zeros((x.shape[0], x.shape[1], spec.rgb_channels if spec.rgb_after else 0), dtype=wide)
    if inputs.skip is not None:
        rgb = rgb + inputs.skip.to(wide)
    outputs: list[Tensor] = []
    summands: list[Tensor] = []
    sums: list[Tensor] = []
    x0 = x
    for layer in range(-1, spec.depth):
        if layer >= 0:
            y = layer_sums(
                product(layer, x),
                packing.bias(inputs.biases, packing.layers[layer]),
                layer_noise(inputs, spec, layer),
                inputs.noise_strengths[layer],
            )
            sums += [] if spec.activation == "lrelu" else [y]
            out = activate(y, spec.activation, spec.negative_slope, spec.gain)
            summands += [] if spec.block_to(layer) is None else [out]
            x = join_block(out, layer, x0, outputs, inputs, spec)
            outputs.append(x)
        for k in spec.rgbs_after(layer):
            rgb = add_rgb(rgb, product(spec.depth + k, x), packing.bias(inputs.biases, packing.rgbs[k]))
    return StackOutputs(outputs, summands, rgb, sums)


class _Remade(Sequence):
    """Outputs of layers with a sine, made of their sums when they are asked for: a backward holds two and not all."""

    def __init__(self, spec: StackSpec, sums: Sequence[Tensor]) -> None:
        self.spec, self.sums = spec, sums

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, layer: int) -> Tensor:
        return activate(self.sums[layer], self.spec.activation, self.spec.negative_slope, self.spec.gain)


def remake_outputs(
    inputs: StackInputs, spec: StackSpec, sums: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`outputs` and `summands` as `stack_layers` found them, from its `sums`."""
    if not spec.blocks:
        return _Remade(spec, sums), ()
    outs = [activate(y, spec.activation, spec.negative_slope, spec.gain) for y in sums]
    x0 = inputs.x.expand(inputs.batch, -1, -1)
    outputs: list[Tensor] = []
    for layer, out in enumerate(outs):
        outputs.append(join_block(out, layer, x0, outputs, inputs, spec))
    return outputs, [outs[last] for _, last in spec.blocks]


def stack_gradients(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    outputs: Sequence[Tensor],
    mods: Sequence[Tensor],
    summands: Sequence[Tensor] = (),
    sums: Sequence[Tensor] = (),
) -> StackGrads:
    """The written-out backward of the stack: every gradient, from the outputs' gradients and what `stack_layers` found.
    A style an image; where styles are blended, gradients are autograd's."""
    packing = spec.packing(inputs.batch)
    x0 = inputs.x.expand(inputs.batch, -1, -1)
    wide = accumulation_dtype(x0.dtype)
    narrow_rgb = None if grad_rgb is None else grad_rgb.to(x0.dtype)
    grad_mods: list[Tensor | None] = [None] * len(packing.matrices)
    grad_biases: list[Tensor] = [x0.new_zeros(m.out_features, dtype=wide) for m in packing.matrices]
    grad_strengths: list[Tensor] = []
    grad_noises: list[Tensor] = []
    grad_skips: list[Tensor] = []
    beside: dict[int, Tensor] = {}  # gradient that a block's skip brings to the input of the block's first layer
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
        block = spec.block_to(layer)
        if block is not None:
            first = spec.blocks[block][0]
            skipped = outputs[first - 1] if first > 0 else x0
            h, beside[first], grad_skip = residual_backward(h, skipped, skip_weight(inputs, spec, block))
            grad_skips += [] if grad_skip is None else [grad_skip.reshape(-1)]
            out = summands[block]
        source = outputs[layer - 1] if layer > 0 else x0
        if spec.activation == "lrelu":
            found = layer_backward(h, source, out, mods[layer], spec.negative_slope, spec.gain)
        else:
            u = activate_backward(h, sums[layer], spec.activation, spec.negative_slope, spec.gain)
            found = sums_backward(u, source, mods[layer])
        h, grad_mods[layer], grad_biases[layer], rows = found
        if layer in beside:
            h = h + beside.pop(layer)
        n = layer_noise(inputs, spec, layer)
        grad_strengths.append(rows.new_zeros(()) if n is None else (rows * n).sum())
        grad_noises.append(rows * inputs.noise_strengths[layer])
    filled = [
        x0.new_zeros((inputs.batch, m.out_features, m.in_features), dtype=wide) if g is None else g
        for g, m in zip(grad_mods, packing.matrices)
    ]
    grad_weights, grad_styles = modulate_all_backward(filled, inputs, spec)
    if grad_skips:
        grad_weights = torch.cat([grad_weights, *grad_skips[::-1]])
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
    outputs, summands, rgb, sums = stack_layers(inputs, spec, mods)
    rgb = _in_order_of(x, rgb)
    features = x.new_empty(0)
    if outputs and (want_features or save):
        features = _in_order_of(x, outputs[-1])
    activations, flat_mods = x.new_empty(0), x.new_empty(0)
    if save:
        widths, blocks = spec.saved
        activations = empty_activations(x, widths, batch, pixels, blocks)
        for layer in range(len(widths) - 2):
            activation(activations, widths, batch, pixels, layer).copy_((sums or outputs)[layer])
        for block in range(len(blocks)):
            summand(activations, widths, batch, pixels, blocks, block).copy_(summands[block])
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
    widths, blocks = spec.saved
    kept = [activation(saved.activations, widths, batch, pixels, i) for i in range(len(widths) - 2)]
    if spec.activation == "lrelu":
        outputs = [*kept, saved.features] if spec.depth else []
        summands = [summand(saved.activations, widths, batch, pixels, blocks, k) for k in range(len(blocks))]
    else:
        outputs, summands = remake_outputs(inputs, spec, kept)
    mods = [packing.mod(saved.mods, matrix) for matrix in packing.matrices]
    grads = stack_gradients(grad_features, grad_rgb, inputs, spec, outputs, mods, summands, kept)
    return grads if grads.x is None else grads._replace(x=_in_order_of(inputs.x, grads.x))


def differentiable_backward(
    grad_features: Tensor | None, grad_rgb: Tensor | None, inputs: StackInputs, spec: StackSpec
) -> StackGrads:
    """The backward as a differentiable function of its inputs, layers' outputs recomputed: the second order of every
    backend differentiates this."""
    mods = modulate_all(inputs, spec)
    outputs, summands, _, sums = stack_layers(inputs, spec, mods)
    return stack_gradients(grad_features, grad_rgb, inputs, spec, outputs, mods, summands, sums)


# --- the public signatures, served by plain autograd ----------------------------------------------------------------


def modfc_stack(x: Tensor, *args: Sequence, layout: str | None = None, skip: Tensor | None = None, **options) -> tuple[Tensor | None, Tensor | None]:
    """`functional.modfc_stack` in plain PyTorch, differentiated by autograd: same arguments, no backend."""
    first = args[0][0] if len(args[0]) else args[4][0]
    x, name = as_compute(x), infer_layout(x, first.shape[1], layout)
    inputs, spec = stack_call(to_pixels(x, name), *args, skip=skip_to_pixels(skip, name, x), **options)
    outputs, _, rgb, _ = stack_layers(inputs, spec, modulate_all(inputs, spec))
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
    gain: float | None = None,
    eps: float = 1e-8,
    layout: str | None = None,
    coords: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """`functional.modfc` in plain PyTorch, differentiated by autograd: same arguments, no backend."""
    x, name = as_compute(x), infer_layout(x, weight.shape[1], layout)
    options = dict(demodulate=demodulate, negative_slope=negative_slope, gain=gain, eps=eps, activation=activation)
    pixels = to_pixels(x, name)
    if style.dim() == 3:
        seed, given = split_noise(noise, 1, x.shape[0], pixels)
        n = given[0] if given is not None else None
        if seed is not None:
            n = counter_noise.normal(seed, layer, x.shape[0], pixels.shape[1], check_coords(coords, x.shape[0], pixels))
            n = n.to(accumulation_dtype(x.dtype))
        kind, slope, gain = resolve_activation(activation, negative_slope, gain)
        options |= dict(activation=kind, negative_slope=slope, gain=gain)
        return from_pixels(modfc_per_pixel(pixels, weight, style, bias, n, noise_strength, **options), name, x)
    inputs, spec = stack_call(
        pixels, [weight], [style], [bias], [noise_strength],
        noise=noise, coords=coords, first_layer=layer, single=True, **options,
    )  # fmt: skip
    outputs = stack_layers(inputs, spec, modulate_all(inputs, spec)).outputs
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
    return from_pixels(stack_layers(inputs, spec, modulate_all(inputs, spec)).rgb, name, x)
