"""Launches of the filter and of the convolutions' tail, on channels-last tensors (others are served, slowly).

Everything is summed in float32 and rounded once; no atomics, so that two runs have the same bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..filter_formulas import blurred_size, empty_plane
from .bias_lrelu import bias_lrelu_kernel
from .blur import blur_kernel
from .blur_transposed import blur_transposed_kernel
from .config import next_power_of_2

_ELEMENTS = 1024  # of a program's row: eight a thread, 16 bytes in half precision
_PAIRS = 512  # of the filter's row: four a thread and neighbour, since more would cost registers and with them threads
_ROWS = 16  # of a program; the three above them are read and filtered twice
_REPEATS = 4  # tiles of a tail's program: the fewer programs, the fewer sums to add up
_CHANNELS = 64  # 128 bytes in half precision: a whole line, and the more columns beside each other


def _tile(width: int, channels: int, elements: int) -> tuple[int, int]:
    """Columns and channels of a program."""
    block_c = min(_CHANNELS, next_power_of_2(channels))
    return min(next_power_of_2(width), max(1, elements // block_c)), block_c


def _parts(programs: int, x: Tensor, wanted: bool) -> Tensor:
    """Where programs leave their sums, `[programs, C]` float32, or nothing."""
    return torch.empty((programs if wanted else 0, x.shape[1]), dtype=torch.float32, device=x.device)


def _total(parts: Tensor) -> Tensor:
    """`[C]`; of nothing, nothing: `[0]`."""
    return parts.sum(0) if len(parts) else parts.flatten()


def _launch(
    x: Tensor, mask: Tensor | None, bias: Tensor | None, out: Tensor, padding: int, stride: int, slope: float,
    before: str, after: bool, sums: bool = False,
) -> Tensor:  # fmt: skip
    """`blur_kernel` from `x` to `out`; returns the sums of `out`, `[C]` or `[0]`."""
    (batch, channels, height, width), (out_height, out_width) = x.shape, out.shape[2:]
    pairs = triton.cdiv(out_width, 2)
    block_w, block_c = _tile(pairs, channels, _PAIRS)
    tiles_c, tiles_w = triton.cdiv(channels, block_c), triton.cdiv(pairs, block_w)
    rows = min(_ROWS, next_power_of_2(out_height))
    strips = triton.cdiv(out_height, rows)
    mask = x if mask is None else mask
    parts = _parts(tiles_w * strips * batch, x, sums)
    blur_kernel[(tiles_c * tiles_w * strips * batch,)](
        x, *_strides(x), mask, *_strides(mask), x if bias is None else bias, out, *_strides(out),
        height, width, out_height, out_width, channels, padding, tiles_c, tiles_w, strips, parts if sums else out,
        STRIDE=stride, BEFORE=before, AFTER=after, BIAS=bias is not None, SUMS=sums, SLOPE=slope,
        ROWS=rows, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return _total(parts)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    b, c, h, w = x.stride()
    return b, h, w, c


def blur(
    x: Tensor, mask: Tensor | None, bias: Tensor | None, padding: int, stride: int, slope: float, activate: bool
) -> Tensor:
    """See `cips_kernels::blur`."""
    out = empty_plane(x, blurred_size(x.shape[2], padding, stride), blurred_size(x.shape[3], padding, stride))
    before = "lrelu" if activate else "none" if mask is None else "slope"
    _launch(x, mask, bias, out, padding, stride, slope, before, False)
    return out


def blur_transposed(
    grad: Tensor, mask: Tensor | None, bias: Tensor | None, height: int, width: int, padding: int, stride: int, slope: float,
    sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `cips_kernels::blur_transposed`."""
    out = empty_plane(grad, height, width)
    if stride == 1:
        # the filter is symmetric: its transpose is the filter, padded by what is missing to a full overlap
        return out, _launch(grad, mask, bias, out, 3 - padding, 1, slope, "none", mask is not None, sums)
    batch, channels = grad.shape[:2]
    block_w, block_c = _tile(width, channels, _ELEMENTS)
    tiles_c, tiles_w = triton.cdiv(channels, block_c), triton.cdiv(width, block_w)
    pairs = (height - 1 + padding) // 2 - padding // 2 + 1
    rows = min(_ROWS // 2, next_power_of_2(pairs))
    strips = triton.cdiv(pairs, rows)
    at = grad if mask is None else mask
    parts = _parts(tiles_w * strips * batch, grad, sums)
    blur_transposed_kernel[(tiles_c * tiles_w * strips * batch,)](
        grad, *_strides(grad), at, *_strides(at), grad if bias is None else bias, out, *_strides(out),
        height, width, *grad.shape[2:], channels, padding, tiles_c, tiles_w, strips, parts if sums else out,
        AFTER=mask is not None, BIAS=bias is not None, SUMS=sums, SLOPE=slope,
        ROWS=rows, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out, _total(parts)


def _pointwise(
    x: Tensor, at: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float, backward: bool, sums: bool
) -> tuple[Tensor, Tensor]:
    form = torch.channels_last
    x, at = x.contiguous(memory_format=form), at.contiguous(memory_format=form)
    residual = None if residual is None else residual.contiguous(memory_format=form)
    out = torch.empty_like(x, memory_format=form)
    channels = x.shape[1]
    rows = x.numel() // channels
    block_c = min(_CHANNELS, next_power_of_2(channels))
    block_p = min(_ELEMENTS // block_c, next_power_of_2(rows))
    tiles, tiles_c = triton.cdiv(rows, block_p * _REPEATS), triton.cdiv(channels, block_c)
    parts = _parts(tiles, x, sums)
    bias_lrelu_kernel[(tiles * tiles_c,)](
        x, at, x if bias is None else bias, x if residual is None else residual, out, parts if sums else out, rows, channels,
        BACKWARD=backward, BIAS=bias is not None, RESIDUAL=residual is not None, SUMS=sums, SLOPE=slope,
        REPEATS=_REPEATS, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out, _total(parts)


def bias_lrelu(x: Tensor, bias: Tensor, residual: Tensor | None, slope: float) -> Tensor:
    """See `cips_kernels::bias_lrelu`; the result is channels-last."""
    return _pointwise(x, x, bias, residual, slope, False, False)[0]


def bias_lrelu_backward(
    grad: Tensor, mask: Tensor, bias: Tensor | None, slope: float, sums: bool
) -> tuple[Tensor, Tensor]:
    """See `cips_kernels::bias_lrelu_backward`; the result is channels-last."""
    return _pointwise(grad, mask, bias, None, slope, True, sums)
