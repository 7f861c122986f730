"""What the on-chip forward for training keeps, and which stacks it serves. Shapes and dtypes alone: no CUDA, no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_onchip
from .spec import StackSaved, StackSpec

CHUNK = 128  # channels that a consumer computes at a time
UNIT_PIXELS = 256  # that two multiprocessors work on together


def why_not(spec: StackSpec, dtype: torch.dtype) -> str | None:
    """None if the kernels can serve a stack whose colours alone are wanted, otherwise the reason."""
    reason = cuda_onchip.why_not(spec, dtype)
    if reason is not None:
        return reason
    if spec.blocks:
        return "it has residual blocks"
    if max(spec.rgb_after) != spec.depth - 1:
        return "no ToRGB reads its last layer"
    if any(width % 32 for width in spec.widths[1:]):
        return f"widths {spec.widths[1:]} of its layers are not multiples of 32"
    return None


def serves(spec: StackSpec, dtype: torch.dtype, want_features: bool) -> bool:
    """Whether a forward of the `cuda` backend that saves is these kernels'. Shapes and dtypes alone decide."""
    return bool(spec.depth and spec.rgb_after) and not want_features and why_not(spec, dtype) is None


def padded(pixels: int) -> int:
    """Pixels in whole units of work."""
    return -(-pixels // UNIT_PIXELS) * UNIT_PIXELS


def empty_saved(x: Tensor, spec: StackSpec, batch: int) -> StackSaved:
    """Uninitialised: for features every layer's output `[B, P, W]`, one after the other in one flat tensor, for activations
    nothing, and for modulated weights the signs, int32."""
    pixels, widths = x.shape[1], spec.widths[1:]
    words = batch * padded(pixels) * sum(-(-width // CHUNK) for width in widths) * CHUNK // 32
    return StackSaved(
        x.new_empty(batch * pixels * sum(widths)), x.new_empty(0), x.new_empty(words, dtype=torch.int32)
    )


def activations(saved: StackSaved, spec: StackSpec, batch: int, pixels: int) -> list[Tensor]:
    """Views `[B, P, W]` of every layer's output, channels in fragment order."""
    widths = spec.widths[1:]
    flat = saved.features.split([batch * pixels * width for width in widths])
    return [t.view(batch, pixels, width) for t, width in zip(flat, widths)]
