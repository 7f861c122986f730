"""The `cuda` backend: modulated weights and their gradients by csrc's kernels, the layers by Triton's."""

from __future__ import annotations

from torch import Tensor

from . import cuda
from .cuda import modulate, modulate_backward
from .spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec
from .triton import stack

__all__ = ["backward", "forward", "modulate", "modulate_backward"]


def forward(inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call."""
    return stack.forward(inputs, spec, want_features, save, modulation=cuda)


def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    saved: StackSaved,
    needs: Needs,
) -> StackGrads:
    """Serve a backward call."""
    return stack.backward(grad_features, grad_rgb, inputs, spec, saved, needs, modulation=cuda)
