"""A style a pixel as a blend of an image's K styles, where no fused kernel takes one: the reference formulation.

Without gradients it runs over a chunk of pixels at a time, so that memory does not grow with their number; with
gradients it runs as a whole, differentiated by autograd, to any order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from . import noise, reference
from .arguments import autocast_on
from .backends import warn_once
from .spec import StackInputs, StackSaved, StackSpec, accumulation_dtype, empty_like_layout, is_channel_major

_CHUNK_ROWS = 1 << 14  # images x pixels: 15 layers of 512 channels of such a chunk are 0.25 GB in bfloat16


def _warn(inputs: StackInputs, reason: str) -> None:
    """Say once, on a GPU, that it is the slow way, and why."""
    if inputs.blend is not None and inputs.x.device.type == "cuda":
        warn_once(f"cips_kernels serves blended styles with the reference backend, which is slower: {reason}.")


def _chunk(inputs: StackInputs, spec: StackSpec, first: int, count: int) -> StackInputs:
    """The call on some pixels. Noise keyed by a pixel's index is drawn here, since a chunk begins to count anew."""
    part = inputs.cut(first, count)
    if inputs.seed is None or inputs.coords is not None:
        return part
    c0, c1 = noise.pixel_counters(count, None, inputs.x.device, first=first)
    image = torch.arange(inputs.batch, device=inputs.x.device)[:, None]
    drawn = [
        noise.normal_at(inputs.seed, c0, c1, image, torch.full_like(image, spec.first_layer + layer))
        for layer in range(spec.depth)
    ]
    given = torch.stack(drawn).to(accumulation_dtype(inputs.x.dtype)) if drawn else None
    return part._replace(seed=None, noise=given)


@torch.no_grad()
def forward(
    inputs: StackInputs,
    spec: StackSpec,
    want_features: bool,
    save: bool,
    reason: str = "no fused kernel of the backend takes them",
) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call, as a backend's `forward`. `reason`: why no fused kernel takes its blend.

    Raises:
        RuntimeError: `save` is asked for. Gradients of blended styles are those of `differentiable`.
    """
    if save:
        raise RuntimeError(
            "modfc_stack: with blend it keeps nothing for a backward; call functional.modfc_stack for gradients"
        )
    x, batch, pixels = inputs.x, inputs.batch, inputs.pixels
    _warn(inputs, reason)
    rgb = empty_like_layout(x, batch, spec.rgb_channels if spec.rgb_after else 0, accumulation_dtype(x.dtype))
    keep = spec.depth > 0 and want_features
    features = empty_like_layout(x, batch, spec.widths[-1], x.dtype) if keep else x.new_empty(0)
    mods = reference.modulate_all(inputs, spec)  # none where styles are blended
    step = max(1, _CHUNK_ROWS // max(1, batch))
    for first in range(0, pixels, step):
        count = min(step, pixels - first)
        part = _chunk(inputs, spec, first, count)
        found = reference.stack_layers(part, spec, mods)
        rgb.narrow(1, first, count).copy_(found.rgb)
        if keep:
            features.narrow(1, first, count).copy_(found.outputs[-1])
    empty = x.new_empty(0)
    return features, rgb, StackSaved(features, empty, empty.clone())


def differentiable(inputs: StackInputs, spec: StackSpec) -> tuple[Tensor, Tensor]:
    """Features (empty without layers) and RGB sum of a call with `inputs.blend`, connected to its inputs' graph."""
    x = inputs.x
    _warn(inputs, "it has gradients, which no fused kernel makes of them")
    # x is in its compute dtype already; a compiler can trace this context, not the operators' own
    with torch.autocast(x.device.type, enabled=False) if autocast_on(x.device) else nullcontext():
        found = reference.stack_layers(inputs, spec, [])
    outputs = found.outputs[-1] if found.outputs else x.new_empty(0), found.rgb
    if not is_channel_major(x):
        return outputs
    return tuple(y if y.dim() < 3 else y.transpose(1, 2).contiguous().transpose(1, 2) for y in outputs)
