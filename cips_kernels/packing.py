"""Where each layer's numbers lie in the flat tensors that the operators exchange.

An operator takes every weight of a stack as one flat tensor, every style as one `[B, S]` matrix, and keeps all modulated
weights in one buffer: the operator's schema stays the same for any depth, one launch serves all layers, and PyTorch's own
`cat` and `narrow` carry the gradients back to the single parameters. This page is the only place that knows the order:
the layers first, then the ToRGBs, and behind the weights of both the skips of residual blocks, which know no style.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments, _Plan = ParamSpec("_Arguments"), TypeVar("_Plan")

ROW_MULTIPLE = 16  # elements; rows of a modulated weight start on 32 bytes, as vector loads and bulk copies need
MATRIX_MULTIPLE = 128  # elements; matrices start on 256 bytes


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Matrix:
    """One modulated matrix: `out_features x in_features`, and its offsets (in elements) in the flat tensors."""

    out_features: int
    in_features: int
    weight_offset: int
    style_offset: int
    bias_offset: int
    mod_offset: int
    row_stride: int
    demodulate: bool


@dataclass(frozen=True)
class Skip:
    """The matrix of a residual block's skip, `out_features x in_features`, and its offset in the flat weights."""

    out_features: int
    in_features: int
    weight_offset: int


@dataclass(frozen=True)
class Packing:
    """The plan of one stack for one batch size. Lengths are in elements. `skips` has an entry a block, None where the
    skip is the identity."""

    layers: tuple[Matrix, ...]
    rgbs: tuple[Matrix, ...]
    skips: tuple[Skip | None, ...]
    batch: int
    weight_numel: int
    style_width: int
    bias_numel: int
    mod_numel: int

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that a style modulates, layers, then ToRGBs: the order of every flat tensor."""
        return self.layers + self.rgbs

    def weight(self, flat: Tensor, matrix: Matrix | Skip) -> Tensor:
        """View `[O, I]` of one weight in the flat weights."""
        count = matrix.out_features * matrix.in_features
        return flat.narrow(0, matrix.weight_offset, count).view(matrix.out_features, matrix.in_features)

    def style(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """View `[B, I]` of one layer's styles in the `[B, S]` styles; of `[B, K, S]` `[B, K, I]`."""
        return flat.narrow(-1, matrix.style_offset, matrix.in_features)

    def bias(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """View `[O]` of one bias in the flat biases."""
        return flat.narrow(0, matrix.bias_offset, matrix.out_features)

    def mod(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """View `[B, O, I]` (row stride `matrix.row_stride`) of one modulated weight in the flat buffer."""
        shape = (self.batch, matrix.out_features, matrix.row_stride)
        count = shape[0] * shape[1] * shape[2]
        return flat.narrow(0, matrix.mod_offset, count).view(shape)[:, :, : matrix.in_features]


def _cached(plan: Callable[_Arguments, _Plan]) -> Callable[_Arguments, _Plan]:
    """`lru_cache`, past which goes a compiler: it traces through, and its symbolic sizes cannot be hashed."""
    cached = lru_cache(maxsize=256)(plan)

    @wraps(plan)
    def choose(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Plan:
        if torch.compiler.is_compiling():
            return plan(*args, **kwargs)
        try:
            return cached(*args, **kwargs)
        except TypeError:
            return plan(*args, **kwargs)

    return choose


@_cached
def pack(
    widths: tuple[int, ...],
    rgb_after: tuple[int, ...],
    rgb_channels: int,
    demodulate: bool,
    batch: int,
    blocks: tuple[tuple[int, int], ...] = (),
) -> Packing:
    """Plan the flat tensors of a stack.

    Args:
        widths: `(I_0, O_0, ..., O_{L-1})`; layer `l` maps `widths[l]` to `widths[l + 1]` channels.
        rgb_after: layers (0-based) after which a ToRGB reads; `-1` reads the stack's input.
        rgb_channels: output channels of each ToRGB.
        demodulate: whether the layers demodulate (ToRGBs never do).
        batch: number of images.
        blocks: (first, last) layer of each residual block.
    """
    shapes = [(o, i, demodulate) for i, o in zip(widths[:-1], widths[1:])]
    shapes += [(rgb_channels, widths[after + 1], False) for after in rgb_after]
    weight = style = bias = mod = 0
    matrices = []
    for out_features, in_features, demod in shapes:
        row_stride = _round_up(in_features, ROW_MULTIPLE)
        matrices.append(Matrix(out_features, in_features, weight, style, bias, mod, row_stride, demod))
        weight += out_features * in_features
        style += in_features
        bias += out_features
        mod += _round_up(batch * out_features * row_stride, MATRIX_MULTIPLE)
    skips: list[Skip | None] = []
    for first, last in blocks:
        in_features, out_features = widths[first], widths[last + 1]
        skips.append(None if in_features == out_features else Skip(out_features, in_features, weight))
        weight += 0 if in_features == out_features else out_features * in_features
    depth = len(widths) - 1
    parts = tuple(matrices[:depth]), tuple(matrices[depth:]), tuple(skips)
    return Packing(*parts, batch, weight, style, bias, mod)


def _saved_widths(widths: tuple[int, ...], blocks: tuple[tuple[int, int], ...]) -> list[int]:
    return [*widths[1:-1], *(widths[last + 1] for _, last in blocks)]


@_cached
def activation_offsets(
    widths: tuple[int, ...], batch: int, pixels: int, blocks: tuple[tuple[int, int], ...] = ()
) -> tuple[int, ...]:
    """Offsets (in elements) of what a forward saves, `[B, P, O_l]` each, and their total, last.

    First what the layers `1..L-1` read: the outputs of `0..L-2`, or of the blocks that end with them. Then, for each
    residual block, what its last layer gave before the addition: the backward needs its sign, which the sum no longer
    tells. It costs one more activation a block. One bit a number would do, but the kernels of the backward read signs
    off an activation, and recomputing the sums instead would keep all of them alive at once where blocks follow one
    another.
    """
    offsets = [0]
    for width in _saved_widths(widths, blocks):
        offsets.append(offsets[-1] + _round_up(batch * pixels * width, MATRIX_MULTIPLE))
    return tuple(offsets)


def zero_gaps(mods: Tensor, packing: Packing) -> None:
    """Zero what lies between matrices, so that the whole buffer has the same bits from call to call."""
    ends = [matrix.mod_offset for matrix in packing.matrices[1:]] + [packing.mod_numel]
    for matrix, end in zip(packing.matrices, ends):
        written = matrix.mod_offset + packing.batch * matrix.out_features * matrix.row_stride
        if written < end:
            mods[written:end].zero_()


def empty_activations(
    x: Tensor, widths: tuple[int, ...], batch: int, pixels: int, blocks: tuple[tuple[int, int], ...] = ()
) -> Tensor:
    """Buffer of what a forward saves in the dtype of `x`: uninitialised but for the gaps between layers, which are 0,
    so that an operator's outputs are the same bits from call to call."""
    offsets = activation_offsets(widths, batch, pixels, blocks)
    flat = x.new_empty(offsets[-1])
    for offset, end, width in zip(offsets[:-1], offsets[1:], _saved_widths(widths, blocks)):
        written = offset + batch * pixels * width
        if written < end:
            flat[written:end].zero_()
    return flat


def activation(flat: Tensor, widths: tuple[int, ...], batch: int, pixels: int, layer: int) -> Tensor:
    """View `[B, P, O_layer]` of one saved layer output in the flat buffer."""
    offset = activation_offsets(widths, batch, pixels)[layer]
    width = widths[layer + 1]
    return flat.narrow(0, offset, batch * pixels * width).view(batch, pixels, width)


def summand(
    flat: Tensor, widths: tuple[int, ...], batch: int, pixels: int, blocks: tuple[tuple[int, int], ...], block: int
) -> Tensor:
    """View `[B, P, O]` of what a block's last layer gave before the addition, in the flat buffer."""
    offset = activation_offsets(widths, batch, pixels, blocks)[len(widths) - 2 + block]
    width = widths[blocks[block][1] + 1]
    return flat.narrow(0, offset, batch * pixels * width).view(batch, pixels, width)


def flatten(tensors: list[Tensor], dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """Join tensors into one flat tensor (`dim=None`) or along `dim`, in `dtype`; differentiable."""
    if dim is None:
        tensors = [t.reshape(-1) for t in tensors]
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 0 if dim is None else dim)
    return joined.to(dtype)
