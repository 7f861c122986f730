"""The `cuda` backend: the stack on chip where colours alone are wanted, otherwise csrc's modulation and Triton's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blended, cuda, cuda_blend, cuda_onchip, cuda_saved, cuda_training
from .backends import warn_once
from .cuda import modulate, modulate_backward
from .encoding import Encoding, by_tiles
from .spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, empty_like_layout
from .triton import stack
from .triton.layers import noise_values

__all__ = ["backward", "backward_of_part", "forward", "modulate", "modulate_backward", "noise_values", "synthesis"]


def forward(inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call."""
    x = inputs.x
    colours_alone = spec.depth and spec.rgb_after and not want_features and not save
    if inputs.blend is not None:
        reason = cuda_blend.why_not(inputs, spec, x.dtype) if colours_alone else "it makes colours alone"
        if reason is not None:
            return blended.forward(inputs, spec, want_features, save, reason)
        rgb = empty_like_layout(x, inputs.batch, spec.rgb_channels, torch.float32)
        cuda_blend.forward(inputs, spec, rgb)
        return x.new_empty(0), rgb, StackSaved(x.new_empty(0), x.new_empty(0), x.new_empty(0))
    if colours_alone:
        reason = cuda_onchip.why_not(spec, x.dtype)
        if reason is None:
            rgb = empty_like_layout(x, inputs.batch, spec.rgb_channels, torch.float32)
            cuda_onchip.forward(inputs, spec, rgb)
            return x.new_empty(0), rgb, StackSaved(x.new_empty(0), x.new_empty(0), x.new_empty(0))
        _warn_slower(reason)
    if save and cuda_saved.serves(spec, x.dtype, want_features):
        rgb = empty_like_layout(x, inputs.batch, spec.rgb_channels, torch.float32)
        saved = cuda_training.forward(inputs, spec, rgb)
        return saved.features, rgb, saved
    return stack.forward(inputs, spec, want_features, save, modulation=cuda)


def synthesis(e: Encoding, dtype: torch.dtype, inputs: StackInputs, spec: StackSpec, rgb: Tensor) -> None:
    """The RGB sums of every point of an encoding."""
    if inputs.blend is not None:
        reason = cuda_blend.why_not(inputs, spec, dtype) or cuda_blend.why_not_encoding(e)
        if reason is None:
            cuda_blend.synthesis(e, dtype, inputs, spec, rgb)
        else:
            by_tiles(e, inputs, spec, rgb, lambda *call: blended.forward(*call, reason))
        return
    reason = cuda_onchip.why_not(spec, dtype) or cuda_onchip.why_not_encoding(e)
    if reason is None:
        cuda_onchip.synthesis(e, dtype, inputs, spec, rgb)
    else:
        _warn_slower(reason)
        by_tiles(e, inputs, spec, rgb, lambda *call: stack.forward(*call, modulation=cuda))


def _warn_slower(reason: str) -> None:
    warn_once(f"cips_kernels runs this stack layer by layer, with Triton: the on-chip kernel cannot serve it, {reason}.")


def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    saved: StackSaved,
    needs: Needs,
    **of_part: Any,
) -> StackGrads:
    """Serve a backward call."""
    if saved.mods.dtype == torch.int32:  # signs: the forward was on chip
        if grad_features is not None:
            raise RuntimeError(
                f"grad_features: got a tensor {list(grad_features.shape)}, expected None: the forward was called with "
                "want_features=False, so there are no features to differentiate"
            )
        return cuda_training.backward(grad_rgb, inputs, spec, saved, needs, **of_part)
    return stack.backward(grad_features, grad_rgb, inputs, spec, saved, needs, modulation=cuda)


def backward_of_part(*call: Any, tight: bool, total_x: Tensor | None) -> StackGrads:
    """The same of a part of a call. tight: in less memory, at some cost. The gradient of `x` may be added to `total_x`, and is
    then not returned."""
    return backward(*call, tight=tight, total_x=total_x)
