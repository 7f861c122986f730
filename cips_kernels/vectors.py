"""Operators on the few vectors in front of a stack, without gradients: the mapping network, and every affine at once.

    mapping     z to w, see `functional.mapping`
    affine      w to styles: `x W^T + b`

On a GPU that `csrc/` serves each is one launch, and the second brings its matrix to the cache while the first still runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, reference
from .ops import operator_context

_library = torch.library.Library("cips_kernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_library.define("mapping(Tensor z, Tensor weights, Tensor biases, float negative_slope, str backend) -> Tensor", tags=_TAGS)
_library.define("affine(Tensor x, Tensor weight, Tensor bias, Tensor upcoming, Tensor? current, str backend) -> Tensor", tags=_TAGS)


def _aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and at an address that is a multiple of 16."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _mapping(z: Tensor, weights: Tensor, biases: Tensor, negative_slope: float, backend: str) -> Tensor:
    with operator_context(z.device):
        if backend == "cuda":
            return cuda.mapping(_aligned(z), weights.contiguous(), biases.contiguous(), negative_slope)
        return reference.mapping(z, weights, biases, negative_slope=negative_slope)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, upcoming: Tensor, current: Tensor | None, backend: str) -> Tensor:
    with operator_context(x.device):
        if backend == "cuda":
            return cuda.affine(_aligned(x), weight, bias, upcoming, current)
        return torch.addmm(bias, x, weight.t())


def mapping(z: Tensor, weights: Tensor, biases: Tensor, negative_slope: float, backend: str) -> Tensor:
    """`functional.mapping` with a resolved backend."""
    return torch.ops.cips_kernels.mapping(z, weights, biases, negative_slope, backend)


def affine(x: Tensor, weight: Tensor, bias: Tensor, upcoming: Tensor, current: Tensor | None = None) -> Tensor:
    """`x W^T + b` of a few vectors.

    Args:
        x: `[N, D]`.
        weight, bias: `[R, D]` and `[R]`, contiguous, of the dtype and on the device of `x`.
        upcoming: what is read next, to be brought to the cache on the way.
        current: the weights of the `mapping` that `x` comes from, if it runs right before: this may then begin while that
            still runs, and brings them to the cache too.

    Returns:
        `[N, R]`.
    """
    fits = cuda.available(x.device.index)[0] if x.is_cuda else False
    name = "cuda" if fits and len(x) > 0 and cuda.why_not_mapping(x) is None else "reference"
    return torch.ops.cips_kernels.affine(x, weight, bias, upcoming, current, name)


_library.impl("mapping", _mapping, "CompositeExplicitAutograd")
torch.library.register_fake("cips_kernels::mapping", lambda z, *_: z.new_empty(z.shape), lib=_library)
_library.impl("affine", _affine, "CompositeExplicitAutograd")
torch.library.register_fake("cips_kernels::affine", lambda x, weight, *_: x.new_empty((len(x), len(weight))), lib=_library)
