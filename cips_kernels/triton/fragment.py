"""Fragment order: how the on-chip stack leaves the channels of a row in memory, and the way back.

A thread that holds part of a matrix unit's result has channels `8 nb + 2 t + e` of every 32 (`t` its place among four, `nb`
0..3, `e` 0..1). Stored side by side they are 16 bytes, one instruction, at position `8 t + 2 nb + e`. The map swaps bits
4:3 of a number with bits 2:1, so it is its own inverse. A sum over rows does not mind the order of channels; its result
does, and is stored where it belongs.
"""

import triton
import triton.language as tl
from torch import Tensor

GROUP = 32  # channels within which the order differs


@triton.jit
def natural(position, FRAGMENT: tl.constexpr):
    """The channel at `position` (or the position of a channel), of any integers; `position` itself unless FRAGMENT."""
    if not FRAGMENT:
        return position
    return (position & -31) | ((position & 24) >> 2) | ((position & 6) << 2)


def to_natural(t: Tensor, dim: int = -1) -> Tensor:
    """A copy of `t` with the channels of `dim` (a multiple of 32) out of fragment order, or into it."""
    check_fragment(t.shape[dim], f"dimension {dim} of t")
    dim %= t.dim()
    return t.unflatten(dim, (-1, 4, 4, 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 3)


def check_fragment(width: int, name: str) -> None:
    """ValueError unless `width` channels can lie in fragment order."""
    if width % GROUP:
        raise ValueError(f"{name} has {width} channels, expected a multiple of {GROUP}: they come in fragment order")
