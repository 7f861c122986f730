"""The backward of a call that kept its inputs alone: the forward again and then the backward, a part of the images or
pixels at a time.

A part's activations are all that is held at once, about a gigabyte for the paper's stack in bfloat16, whatever the number
of images and their size. Gradients are sums over parts in a fixed order, in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from .noise import normal_at, pixel_counters
from .spec import Needs, StackGrads, StackInputs, StackSpec, accumulation_dtype, empty_like_layout

_ROWS = 1 << 16  # images x pixels of a part: one 256 x 256 image

NoiseValues = Callable[[StackInputs, StackSpec, int, int], "Tensor | None"]


def noise_values(inputs: StackInputs, spec: StackSpec, first_pixel: int, first_image: int) -> Tensor | None:
    """Counter noise of every layer of a part, `[L, B, P]` float32, in plain PyTorch."""
    if inputs.seed is None or not spec.depth:
        return None
    device = inputs.seed.device
    c0, c1 = pixel_counters(inputs.pixels, inputs.coords, device, first_pixel)
    image = torch.arange(first_image, first_image + inputs.batch, device=device)[:, None]
    layers = range(spec.first_layer, spec.first_layer + spec.depth)
    return torch.stack([normal_at(inputs.seed, c0, c1, image, torch.full_like(image, layer)) for layer in layers])


def parts(batch: int, pixels: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(first image, images, first pixel, pixels) of each part of at most `rows` images x pixels: whole images as long as
    one fits."""
    images = max(1, rows // max(1, pixels))
    count = pixels if pixels <= rows else rows
    for image in range(0, batch, images):
        for pixel in range(0, pixels, count):
            yield image, min(images, batch - image), pixel, min(count, pixels - pixel)


def _cut(t: Tensor | None, dim: int, first: int, count: int, full: int) -> Tensor | None:
    """Those images of a tensor that has one entry an image in `dim`; as it is where it has one for all."""
    return t if t is None or full == 1 or t.shape[dim] != full else t.narrow(dim, first, count)


def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    needs: Needs,
    module: ModuleType,
    values: NoiseValues = noise_values,
) -> StackGrads:
    """The gradients of a call, by `module.forward` and `module.backward` of its parts.

    Args:
        module: a backend.
        values: what draws a part's counter noise, which a backend by itself would count from the part's first image.
    """
    x, batch, pixels = inputs.x, inputs.batch, inputs.pixels
    wide = accumulation_dtype(x.dtype)
    shared = x.shape[0] == 1 and batch > 1
    total = StackGrads(
        # the sum over images of a shared input must not be rounded in between
        empty_like_layout(x, x.shape[0], x.shape[2], wide if shared else x.dtype).zero_() if needs.x else None,
        torch.zeros_like(inputs.weights) if needs.weights else None,
        torch.zeros_like(inputs.styles) if needs.weights else None,
        torch.zeros_like(inputs.biases) if needs.biases else None,
        torch.zeros_like(inputs.noise_strengths) if needs.noise else None,
        torch.zeros_like(inputs.noise, memory_format=torch.contiguous_format)
        if needs.noise and inputs.noise is not None
        else None,
    )
    for image, images, pixel, count in parts(batch, pixels, _ROWS):
        part = inputs.cut(pixel, count)
        part = part._replace(
            x=_cut(part.x, 0, image, images, x.shape[0]),
            styles=part.styles.narrow(0, image, images),
            skip=None,  # adds to the sum and is not asked for here
            noise=None if part.noise is None else part.noise.narrow(1, image, images),
            coords=_cut(part.coords, 0, image, images, batch) if part.coords is not None and part.coords.dim() == 3 else part.coords,
        )
        if part.seed is not None:
            part = part._replace(noise=values(part, spec, pixel, image), seed=None)
        features, _, saved = module.forward(part, spec, False, True)
        del features  # saved holds it
        grads = [
            None if g is None else g.narrow(0, image, images).narrow(1, pixel, count) for g in (grad_features, grad_rgb)
        ]
        found = module.backward(*grads, part, spec, saved, needs)
        del saved
        _add(total, found, inputs, image, images, pixel, count)
        del part, grads, found  # before the next one's are made
    return total._replace(x=total.x.to(x.dtype)) if total.x is not None else total


def _add(
    total: StackGrads, found: StackGrads, inputs: StackInputs, image: int, images: int, pixel: int, count: int
) -> None:
    if total.x is not None:
        of_images = slice(None) if inputs.x.shape[0] == 1 else slice(image, image + images)
        total.x[of_images, pixel : pixel + count] += found.x
    if total.weights is not None:
        total.weights.add_(found.weights)
        total.styles[image : image + images] += found.styles
    if total.biases is not None:
        total.biases.add_(found.biases)
    if total.noise_strengths is not None:
        total.noise_strengths.add_(found.noise_strengths)
    if total.noise is not None:
        total.noise[:, image : image + images, pixel : pixel + count] += found.noise
