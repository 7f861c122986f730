"""Launches of the modulate kernels: one for all matrices forward, two backward."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from ..packing import Packing, zero_gaps
from .config import next_power_of_2
from .modulate import modulate_bwd_kernel, modulate_fwd_kernel, modulate_style_sum_kernel

_STYLE_CHUNK = 128


def _block(packing: Packing) -> tuple[int, int]:
    """Rows a program, and the padded row length."""
    block_i = next_power_of_2(max(matrix.row_stride for matrix in packing.matrices))
    return max(1, min(16, 4096 // block_i)), block_i


@cache  # never dropped: a captured CUDA graph may still read the tables
def _tables(packing: Packing, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One line of eight numbers a program, and one of four a matrix."""
    lines, spans = [], []
    for m in packing.matrices:
        first = len(lines)
        for row in range(0, m.out_features, rows):
            lines.append(
                (row, m.out_features, m.in_features, m.weight_offset, m.style_offset, m.mod_offset, m.row_stride, int(m.demodulate))
            )
        spans.append((first, len(lines) - first, m.in_features, m.style_offset))
    return tuple(torch.tensor(table, dtype=torch.int64, device=device) for table in (lines, spans))


def modulate(weights: Tensor, styles: Tensor, packing: Packing, dtype: torch.dtype, eps: float) -> Tensor:
    """All modulated weights, packed (see packing), in `dtype`; `weights` flat and `styles` `[B, S]` float32, contiguous."""
    rows, block_i = _block(packing)
    lines, _ = _tables(packing, rows, weights.device)
    mods = torch.empty(packing.mod_numel, dtype=dtype, device=weights.device)
    modulate_fwd_kernel[(lines.shape[0], packing.batch)](
        weights, styles, styles.stride(0), mods, lines, eps, ROWS=rows, BLOCK_I=block_i, num_warps=4
    )
    zero_gaps(mods, packing)
    return mods


def modulate_backward(
    grad_mods: Tensor, weights: Tensor, styles: Tensor, packing: Packing, eps: float
) -> tuple[Tensor, Tensor]:
    """Flat gradients of the weights and `[B, S]` of the styles, from N packed as the modulated weights, float32."""
    rows, block_i = _block(packing)
    lines, spans = _tables(packing, rows, weights.device)
    grad_weights, grad_styles = torch.empty_like(weights), torch.empty_like(styles)
    parts = torch.empty((lines.shape[0], packing.batch, block_i), dtype=torch.float32, device=weights.device)
    modulate_bwd_kernel[(lines.shape[0],)](
        grad_mods, weights, styles, styles.stride(0), grad_weights, parts, lines, packing.batch, eps,
        ROWS=rows, BLOCK_I=block_i, num_warps=4,
    )  # fmt: skip
    widest = max(matrix.in_features for matrix in packing.matrices)
    grid = (spans.shape[0], packing.batch, triton.cdiv(widest, _STYLE_CHUNK))
    modulate_style_sum_kernel[grid](
        parts, grad_styles, grad_styles.stride(0), spans, packing.batch, BLOCK_I=block_i, CHUNK=_STYLE_CHUNK, num_warps=4
    )
    return grad_weights, grad_styles
