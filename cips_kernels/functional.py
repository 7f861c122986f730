"""The stateless operators: modulate, modfc, to_rgb, modfc_stack.

`reference` has the same functions in plain PyTorch with the same arguments, less `backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from . import blended, cuda, cuda_saved, ops, reference, vectors
from .activations import resolve_activation
from .arguments import (
    COMPUTE_DTYPES,
    Noise,
    as_compute,
    autocast_on,
    check_save,
    check_scalars,
    expect_finite,
    expect_parameter,
    expect_scalar,
    expect_shape,
    from_pixels,
    infer_layout,
    skip_to_pixels,
    stack_call,
    to_pixels,
)
from .backends import resolve, warn_once, why_not
from .encoding import Encoding, check_encoding, encode, points
from .spec import StackInputs, StackSpec, accumulation_dtype


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _run(
    inputs: StackInputs, spec: StackSpec, want_features: bool, backend: str, save: str = "all"
) -> tuple[Tensor, Tensor]:
    differentiated = _needs_gradient(*inputs)
    # leaky ReLUs alone are what the on-chip kernels have
    on_chip = spec.activation == "lrelu" and bool(spec.depth and spec.rgb_after) and not want_features
    if differentiated and save != "none":
        on_chip = cuda_saved.serves(spec, inputs.x.dtype, want_features)
    name = resolve(backend, inputs.x.device, inputs.x.dtype, on_chip)
    if inputs.batch * inputs.pixels == 0:
        # an empty launch is an error on a GPU; the reference keeps shapes and the graph
        name = "reference"
    if inputs.blend is not None and differentiated:
        return blended.differentiable(inputs, spec)
    return ops.run_stack(inputs, spec, want_features, name, save)


def modulate(
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Modulated weights of each image: `M = d V`, `V_ij = s_j W_ij / sqrt(I)`, `d_i = 1 / sqrt(sum_j V_ij^2 + eps)`.

    Args:
        weight: `[O, I]`, any floating dtype; computed in float32 (float64 for float64).
        style: `[B, I]`, the affine's output.
        demodulate: False leaves out `d` (ToRGB).
        eps: added to the squared norm.
        dtype: of the result, the weight's by default.
        backend: see `backends`.

    Returns:
        `[B, O, I]`, contiguous.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for cannot serve.
    """
    expect_shape("weight", weight, (None, None), "[O, I]")
    out_dtype = dtype or weight.dtype
    for argument, given in (("weight", weight.dtype), ("dtype", out_dtype)):
        if given not in COMPUTE_DTYPES:
            raise TypeError(f"{argument}: expected float16, bfloat16, float32 or float64, got {given}")
    expect_shape("style", style, (None, weight.shape[1]), "[B, I]")
    expect_parameter("style", style, weight, "weight")
    expect_finite("style", style)
    check_scalars(0.0, 1.0, eps)
    wide = accumulation_dtype(weight.dtype)
    name = resolve(backend, weight.device, out_dtype)
    if weight.numel() * style.numel() == 0:
        name = "reference"
    return torch.ops.cips_kernels.modulate(weight.to(wide), style.to(wide), demodulate, float(eps), out_dtype, name)


def mapping(
    z: Tensor, weights: Tensor, biases: Tensor, *, negative_slope: float = 0.2, backend: str = "auto"
) -> Tensor:
    """The mapping network from z to w: `x = z rsqrt(mean(z^2) + 1e-8)`, then `x = lrelu(W_l x + b_l)` for each layer.

    Without gradients it is one launch on a GPU that `csrc/` serves, where layer by layer it takes three launches each.

    Args:
        z: `[N, D]`, float32 or float64.
        weights: `[L, D, D]`, with every factor multiplied in (equalised learning rate, gain).
        biases: `[L, D]`, likewise.
        negative_slope: of the leaky ReLU.
        backend: "cuda" insists on the kernel, which takes float32 and a D that is a multiple of 32 up to 512.

    Returns:
        w, `[N, D]`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for cannot serve.
    """
    expect_shape("z", z, (None, None), "[N, D]")
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"z: expected float32 or float64, got {z.dtype}")
    dim = z.shape[1]
    expect_shape("weights", weights, (None, dim, dim), "[L, D, D]")
    expect_shape("biases", biases, (weights.shape[0], dim), "[L, D]")
    for argument, tensor in (("weights", weights), ("biases", biases)):
        expect_parameter(argument, tensor, z, "z")
    check_scalars(negative_slope, 1.0, 0.0)
    name = resolve(backend, z.device, z.dtype)
    if backend == "auto":
        fits = why_not("cuda", z.device, z.dtype) is None and cuda.why_not_mapping(z) is None
        name = "cuda" if fits else "reference"
    if _needs_gradient(z, weights, biases) or z.numel() * weights.numel() == 0:
        return reference.mapping(z, weights, biases, negative_slope=negative_slope)
    return vectors.mapping(z, weights, biases, float(negative_slope), name)


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
    backend: str = "auto",
) -> Tensor:
    """One modulated fully-connected layer with noise, bias and activation (CIPS section 3; DESIGN section 2).

    Args:
        x: `[B, P, I]`, `[B, I, P]` or `[B, I, H, W]` (contiguous or channels-last), float16, bfloat16, float32 or float64:
            the compute dtype, unless autocast gives another. Batch 1 is shared by all styles.
        weight: `[O, I]`.
        style: `[B, I]`, or `[B, P, I]` for a style a pixel (served by the reference formulation).
        bias: `[O]`.
        noise: None is off; an int or int64 scalar tensor is the seed of counter noise; a float tensor `[B, P]` is the noise.
        noise_strength: scalar tensor, 1 where None.
        demodulate: normalise each row of the modulated weight.
        activation: "lrelu", "linear", "sin" or "sinrelu" (see `activations`).
        negative_slope, gain: of the activation; slope >= 0, gain > 0. By default the official gain: 1 for "sin", sqrt(2)
            for the others.
        eps: added to the squared norm of a row.
        layout: "bpc", "bcp" or "bchw"; needed only where the shape is ambiguous.
        coords: `[P, 2]` or `[B, P, 2]`: keys the counter noise by position rather than index.
        layer: the layer's number in the noise counter.
        backend: see `backends`.

    Parameters may be float32 or the dtype of `x` (float64 with float64).

    Returns:
        As `x` with O channels, in the layout and memory order of `x`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for cannot serve.
    """
    options = dict(demodulate=demodulate, activation=activation, negative_slope=negative_slope, gain=gain, eps=eps)
    x = as_compute(x)
    expect_shape("weight", weight, (None, None), "[O, I]")
    if isinstance(style, Tensor) and style.dim() == 3:
        return _modfc_per_pixel(x, weight, style, bias, noise, noise_strength, options, layout, coords, layer, backend)
    name = infer_layout(x, weight.shape[1], layout)
    inputs, spec = stack_call(
        to_pixels(x, name), [weight], [style], [bias], [noise_strength],
        noise=noise, coords=coords, first_layer=layer, single=True, **options,
    )  # fmt: skip
    features, _ = _run(inputs, spec, True, backend)
    return from_pixels(features, name, x)


def _modfc_per_pixel(x, weight, style, bias, noise, strength, options, layout, coords, layer, backend):
    """Checks and the reference formulation of a style a pixel."""
    name = infer_layout(x, weight.shape[1], layout)
    pixels = to_pixels(x, name)
    expect_shape("style", style, (pixels.shape[0], pixels.shape[1], weight.shape[1]), "[B, P, I]")
    expect_parameter("weight", weight, x)
    expect_parameter("style", style, x)
    expect_finite("style", style)
    if bias is not None:
        expect_shape("bias", bias, (weight.shape[0],), "[O]")
        expect_parameter("bias", bias, x)
    if strength is not None:
        expect_scalar("noise_strength", strength, x)
    check_scalars(*resolve_activation(options["activation"], options["negative_slope"], options["gain"])[1:], options["eps"])
    served = resolve(backend, x.device, x.dtype)
    if served != "reference" and backend != "auto":
        raise RuntimeError(f"backend {served!r} cannot serve this call: a style a pixel is served by 'reference'")
    if x.device.type == "cuda" and served != "reference":
        warn_once("cips_kernels serves a style a pixel with the reference backend, which is slower: no fused kernel takes one yet.")
    # x is in its compute dtype already; a compiler can trace this context, not the operators' own
    with torch.autocast(x.device.type, enabled=False) if autocast_on(x.device) else nullcontext():
        return reference.modfc(
            x, weight, style, bias, noise, strength, layout=name, coords=coords, layer=layer, **options
        )


def to_rgb(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    layout: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """A ToRGB: `skip + R x + r`, R modulated and not demodulated.

    Args:
        x: as in `modfc`.
        weight: `[C, I]`, C usually 3.
        style: `[B, I]`.
        bias: `[C]`.
        skip: the RGB sum so far, in the layout of `x` with C channels.
        layout, backend: as in `modfc`.

    Returns:
        In the layout of `x` with C channels, float32 whatever the compute dtype (float64 for float64): a sum over layers.
    """
    x = as_compute(x)
    expect_shape("weight", weight, (None, None), "[C, I]")
    name = infer_layout(x, weight.shape[1], layout)
    pixel_skip = skip_to_pixels(skip, name, x)
    inputs, spec = stack_call(to_pixels(x, name), [], [], [], [], [weight], [style], [bias], [-1], pixel_skip, single=True)
    _, rgb = _run(inputs, spec, False, backend)
    return from_pixels(rgb, name, x)


def modfc_stack(
    x: Tensor | Encoding,
    weights: Sequence[Tensor],
    styles: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    noise_strengths: Sequence[Tensor | None],
    rgb_weights: Sequence[Tensor] = (),
    rgb_styles: Sequence[Tensor] = (),
    rgb_biases: Sequence[Tensor | None] = (),
    rgb_after: Sequence[int] = (),
    skip: Tensor | None = None,
    *,
    noise: Noise = None,
    coords: Tensor | None = None,
    demodulate: bool = True,
    activation: str = "lrelu",
    negative_slope: float = 0.2,
    gain: float | None = None,
    eps: float = 1e-8,
    blocks: Sequence[Sequence[int]] = (),
    skip_weights: Sequence[Tensor | None] = (),
    blend: Tensor | None = None,
    layout: str | None = None,
    want_features: bool = True,
    save: str = "all",
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """The layers and skips of a whole generator as one operator.

    Args:
        x: as in `modfc`; batch 1 is shared by all images, and its gradient is then the sum over them. Or an `Encoding`:
            the input as a function of coordinates. Where colours alone are wanted, without gradients or with
            `save="none"`, it is never made as a whole, and memory does not grow with the number of pixels; its noise is keyed by its points, and the layout
            is "bpc".
        weights: `[O_l, I_l]`, one a layer; each layer's I is the O of the one before.
        styles: `[B, I_l]`.
        biases: `[O_l]` or None.
        noise_strengths: scalars, or None for 1.
        rgb_weights, rgb_styles, rgb_biases: of each ToRGB, `[C, I]`, `[B, I]`, `[C]`.
        rgb_after: layer (from 0) after which each ToRGB reads; -1 reads `x`.
        skip: added to the RGB sum.
        noise: as in `modfc`; given noise is `[L, B, P]`.
        demodulate, activation, negative_slope, gain, eps: of every layer, as in `modfc`.
        blocks: (first, last) layer of each residual block, in order and apart. What the layer and the ToRGBs after
            `last` read is `(y_last + skip(x_first)) / sqrt(2)`, with `y_last` the output of layer `last` and `x_first`
            the input of layer `first`.
        skip_weights: for each block None where both have as many channels, since the skip is then the identity,
            otherwise `[O, I]` of `skip(x) = W x / sqrt(I)`. May be left out where all are None.
        blend: `[P, K]` for all images or `[B, P, K]`, floating: then styles and rgb_styles are `[B, K, I]`, and the
            style of pixel p is `s_p = sum_k blend_pk s_k`, demodulated exactly: `y = d_p * (c W (s_p * x))`, `d_p` from
            `s_p`. Styles are outputs of affine maps, so where a pixel's weights add up to one this is what the blend of
            their inputs w would give. Colours alone without gradients, of one or two styles, take the on-chip kernel where
            there is one (bfloat16 and float16, no residual blocks; weights rounded to that dtype). All else is served by the
            reference formulation, twice differentiable in everything, blend included; without gradients in chunks of
            pixels, so that memory beyond the result does not grow with their number.
        want_features: False saves the last layer's output where only RGB is wanted.
        save: what is kept for a backward. "all": every layer's output. "none": the inputs alone; the backward runs the
            forward again, an image or a tile of pixels at a time, whose activations are all that it then holds. "some":
            every layer's output of the first half of the images, or of the pixels where there is but one image, and of
            the others the inputs alone: half of the memory, half of the time that "none" adds. Without gradients nothing
            is kept. Gradients differ in the last bits, since sums over pixels are taken in other parts.

    Returns:
        `(features, rgb)`: the output of the last layer, or of the block that ends with it (None unless wanted, or
        without layers) and the RGB sum (float32; None without ToRGBs), in the layout of `x`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for cannot serve.
    """
    if not len(weights) + len(rgb_weights):
        raise ValueError("weights: expected at least one layer or ToRGB, got none")
    check_save(save)
    if blend is not None and save != "all":
        raise ValueError(f"save: expected 'all' with a blend, whose gradients are autograd's, got {save!r}")
    if isinstance(x, Encoding):
        if coords is not None or layout not in (None, "bpc"):
            raise ValueError("coords, layout: expected None and 'bpc' beside an Encoding, which has its own points")
        parts = (weights, styles, biases, noise_strengths, rgb_weights, rgb_styles, rgb_biases, rgb_after)
        options = dict(noise=noise, demodulate=demodulate, activation=activation, negative_slope=negative_slope,
                       gain=gain, eps=eps, blocks=blocks, skip_weights=skip_weights, blend=blend)  # fmt: skip
        return _encoded_stack(x, parts, skip, options, want_features, save, backend)
    x = as_compute(x)
    first = weights[0] if len(weights) else rgb_weights[0]
    expect_shape("weights[0]" if len(weights) else "rgb_weights[0]", first, (None, None), "[O, I]")
    name = infer_layout(x, first.shape[1], layout)
    inputs, spec = stack_call(
        to_pixels(x, name), weights, styles, biases, noise_strengths, rgb_weights, rgb_styles, rgb_biases, rgb_after,
        skip_to_pixels(skip, name, x), noise=noise, coords=coords, demodulate=demodulate,
        activation=activation, negative_slope=negative_slope, gain=gain, eps=eps, blocks=blocks, skip_weights=skip_weights, blend=blend,
    )  # fmt: skip
    features, rgb = _run(inputs, spec, want_features, backend, save)
    kept = from_pixels(features, name, x) if want_features and spec.depth else None
    return kept, from_pixels(rgb, name, x) if spec.rgb_after else None


def _encoded_stack(
    e: Encoding, parts: Sequence, skip: Tensor | None, options: dict, want_features: bool, save: str, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """A stack over an encoding: made as a whole where features are wanted, or gradients of what is kept, otherwise never."""
    check_encoding(e)
    weight = e.fourier_weight
    dtype = e.dtype or (as_compute(weight[:0]).dtype if weight.dtype != torch.float64 else weight.dtype)
    e = e._replace(dtype=dtype)
    every_style = [*parts[1], *parts[5]]
    none = isinstance(every_style[0], Tensor) and every_style[0].shape[:1] == (0,)  # one encoding serves all images, but not none
    # stands for the encoding in every check, and has no memory
    shape = (0 if none else e.images, e.pixels, e.features)
    x = torch.empty((), dtype=dtype, device=weight.device).expand(shape)
    inputs, spec = stack_call(x, *parts, skip, **options)
    blend = inputs.blend is not None
    whole = want_features or skip is not None or not (spec.depth and spec.rgb_after) or inputs.batch * e.pixels == 0
    differentiated = _needs_gradient(*inputs, weight, e.fourier_bias, e.table, e.coords)
    if whole or (differentiated and (save != "none" or blend)):
        encoded = encode(e)
        inputs = inputs._replace(x=encoded[:0] if none else encoded, coords=points(e).detach().float())
        features, rgb = _run(inputs, spec, want_features, backend, save)
        return (features if want_features and spec.depth else None), (rgb if spec.rgb_after else None)
    name = resolve(backend, x.device, dtype, spec.activation == "lrelu")
    return None, ops.run_synthesis(e, inputs, spec, name)
