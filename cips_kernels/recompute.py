"""A call that keeps less than every layer's output: of half of its images or pixels, or of none.

The backward runs the forward of the others again, a part of the images or pixels at a time, whose activations, about a
gigabyte for the paper's stack in bfloat16, are all that it then holds besides. Gradients are sums over parts in a fixed
order, in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .noise import normal_at, pixel_counters
from .spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, accumulation_dtype, empty_like_layout

_ROWS = 1 << 16  # images x pixels of a part: one 256 x 256 image
_UNIT = 256  # pixels: an image is cut where on-chip kernels begin a unit of work


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


def kept(batch: int, pixels: int, save: str) -> tuple[int, int]:
    """(images, pixels of each) of which a forward keeps every layer's output: the first ones. With "some" half of the images,
    or of the pixels where there is but one image, rounded up."""
    if save != "some":
        return (batch, pixels) if save == "all" else (0, 0)
    return ((batch + 1) // 2, pixels) if batch > 1 else (batch, min(pixels, (pixels // 2 + _UNIT - 1) // _UNIT * _UNIT))


def _others(batch: int, pixels: int, images: int, count: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """As `parts`, of all but the first `images` images, or but the first `count` pixels of the only one."""
    first_image, first_pixel = (images, 0) if count in (0, pixels) else (0, count)
    for image, number, pixel, size in parts(batch - first_image, pixels - first_pixel, rows):
        yield image + first_image, number, pixel + first_pixel, size


def _cut(t: Tensor | None, dim: int, first: int, count: int, full: int) -> Tensor | None:
    """Those images of a tensor that has one entry an image in `dim`; as it is where it has one for all."""
    return t if t is None or full == 1 or t.shape[dim] != full else t.narrow(dim, first, count)


def _part(
    inputs: StackInputs, spec: StackSpec, module: ModuleType, image: int, images: int, pixel: int, count: int
) -> StackInputs:
    """The call on some images and pixels, with the noise of the whole call, which a backend by itself would count from the
    part's first image."""
    batch, coords = inputs.batch, inputs.coords
    part = inputs.cut(pixel, count)
    part = part._replace(
        x=_cut(part.x, 0, image, images, inputs.x.shape[0]),
        styles=part.styles.narrow(0, image, images),
        skip=_cut(part.skip, 0, image, images, batch),
        noise=None if part.noise is None else part.noise.narrow(1, image, images),
        coords=_cut(part.coords, 0, image, images, batch) if coords is not None and coords.dim() == 3 else part.coords,
    )
    if part.seed is None or image + pixel == 0:  # a backend counts from the first image and pixel
        return part
    values = getattr(module, "noise_values", noise_values)
    return part._replace(noise=values(part, spec, pixel, image), seed=None)


def forward(
    inputs: StackInputs, spec: StackSpec, want_features: bool, save: str, module: ModuleType
) -> tuple[Tensor, Tensor, StackSaved]:
    """As `module.forward`, keeping what `kept` says. Features that are not wanted are those of what is kept."""
    batch, pixels = inputs.batch, inputs.pixels
    images, count = kept(batch, pixels, save)
    if images * count in (0, batch * pixels):
        return module.forward(inputs, spec, want_features, save != "none")
    features, rgb, saved = module.forward(_part(inputs, spec, module, 0, images, 0, count), spec, want_features, True)
    rest = (images, batch - images, 0, pixels) if batch > 1 else (0, 1, count, pixels - count)
    rest_features, rest_rgb, _ = module.forward(_part(inputs, spec, module, *rest), spec, want_features, False)

    def both(first: Tensor, second: Tensor) -> Tensor:
        whole = empty_like_layout(inputs.x, batch, first.shape[2], first.dtype)
        of_first, of_second = whole.split_with_sizes((images, rest[1]) if batch > 1 else (count, rest[3]), 0 if batch > 1 else 1)
        of_first.copy_(first), of_second.copy_(second)
        return whole

    return both(features, rest_features) if want_features and spec.depth else features, both(rgb, rest_rgb), saved


def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    saved: StackSaved,
    save: str,
    needs: Needs,
    module: ModuleType,
) -> StackGrads:
    """The gradients of a call, by `module.backward` of what is kept, and `module.forward` and `module.backward` of parts of
    the others.

    Args:
        saved: of what is kept, but for features, which may be those of the whole call.
        save: what is kept, "some" or "none", see `kept`.
        module: a backend.
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
    inputs = inputs._replace(skip=None)  # adds to the sum and is not asked for here
    images, count = kept(batch, pixels, save)
    of_part = getattr(module, "backward_of_part", None)

    def add(saved: StackSaved | None, image: int, images: int, pixel: int, count: int) -> None:
        part = _part(inputs, spec, module, image, images, pixel, count)
        if saved is None:
            features, _, saved = module.forward(part, spec, False, True)
            del features  # saved holds it
        grads = [
            None if g is None else g.narrow(0, image, images).narrow(1, pixel, count) for g in (grad_features, grad_rgb)
        ]
        call = (*grads, part, spec, saved, needs)
        whose = slice(None) if x.shape[0] == 1 else slice(image, image + images)
        total_x = None if total.x is None else total.x[whose, pixel : pixel + count]
        if of_part is None:
            found = module.backward(*call)
        else:
            found = of_part(*call, tight=save == "none", total_x=total_x)
        del saved, call
        if total_x is not None and found.x is not None:
            total_x += found.x
        _add(total, found, image, images, pixel, count)

    if images * count:
        if saved.features.dim() == 3:
            saved = saved._replace(features=saved.features[:images, :count])
        add(saved, 0, images, 0, count)
    # where much is kept, larger parts add little and cost less: each has its own sums of every weight
    for place in _others(batch, pixels, images, count, max(_ROWS, images * count // 4)):
        add(None, *place)
    return total._replace(x=total.x.to(x.dtype)) if total.x is not None else total


def _add(total: StackGrads, found: StackGrads, image: int, images: int, pixel: int, count: int) -> None:
    """All but the gradient of `x`."""
    if total.weights is not None:
        total.weights.add_(found.weights)
        total.styles[image : image + images] += found.styles
    if total.biases is not None:
        total.biases.add_(found.biases)
    if total.noise_strengths is not None:
        total.noise_strengths.add_(found.noise_strengths)
    if total.noise is not None:
        total.noise[:, image : image + images, pixel : pixel + count] += found.noise
