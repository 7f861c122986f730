"""Layers with a sine (activation "sin" or "sinrelu") that no fused kernel serves: the reference formulation.

Triton's kernels have sines, but not in residual blocks: what a block adds up is made of outputs, of which a backward would
have to make several again at once. Without gradients this runs over a chunk of pixels at a time, so that memory does not
grow with their number.
"""

from __future__ import annotations

from torch import Tensor

from . import blended, reference
from .backends import warn_once
from .reference import backward
from .spec import StackInputs, StackSaved, StackSpec

__all__ = ["backward", "forward", "fused"]


def fused(backend: str, spec: StackSpec) -> bool:
    """Whether a backend's own kernels serve a stack with a sine; says once where they should and do not."""
    if backend not in ("triton", "cuda"):
        return False
    if spec.blocks:
        warn_once(
            "cips_kernels serves this stack with the reference formulation, which is slower: its activation is"
            f" {spec.activation!r}, which the kernels of {backend!r} do not have in residual blocks."
        )
    return not spec.blocks


def forward(inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call, as a backend's `forward`."""
    if save and inputs.blend is None:
        return reference.forward(inputs, spec, want_features, save)
    return blended.forward(inputs, spec, want_features, save)
