"""Layers with a sine (activation "sin" or "sinrelu"): the reference formulation, on every backend.

No fused kernel has a sine: their backward reads a leaky ReLU's derivative off the sign of the output, of which a sine's
needs more. Without gradients it runs over a chunk of pixels at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

from torch import Tensor

from . import blended, reference
from .backends import warn_once
from .reference import backward
from .spec import StackInputs, StackSaved, StackSpec

__all__ = ["backward", "forward", "warn"]


def warn(backend: str, spec: StackSpec) -> None:
    """Say once that a backend of fused kernels does not serve a stack itself."""
    if backend in ("triton", "cuda"):
        warn_once(
            "cips_kernels serves this stack with the reference formulation, which is slower: its activation is"
            f" {spec.activation!r}, and the kernels of {backend!r} have leaky ReLU alone."
        )


def forward(inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call, as a backend's `forward`."""
    if save and inputs.blend is None:
        return reference.forward(inputs, spec, want_features, save)
    return blended.forward(inputs, spec, want_features, save)
