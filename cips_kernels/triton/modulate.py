"""Modulated weights of all layers and images in one launch, and their gradients in two.

A program owns ROWS output channels of one matrix, read from a small table; the table has one line a program.
"""

import triton
import triton.language as tl


@triton.jit
def modulate_fwd_kernel(
    weight_ptr, style_ptr, stride_sb, mod_ptr, table_ptr, eps, ROWS: tl.constexpr, BLOCK_I: tl.constexpr
):
    """`M = d V` for ROWS rows of one matrix and one image, rounded once; padding columns become zeros."""
    line = table_ptr + tl.program_id(0).to(tl.int64) * 8
    image = tl.program_id(1).to(tl.int64)
    row0, rows, in_features = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    weight_offset, style_offset = tl.load(line + 3), tl.load(line + 4)
    mod_offset, row_stride, demodulate = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    offs_r = row0 + tl.arange(0, ROWS)
    offs_i = tl.arange(0, BLOCK_I)
    inside_r, inside_i = offs_r < rows, offs_i < in_features
    inside = inside_r[:, None] & inside_i[None, :]
    w = tl.load(weight_ptr + weight_offset + offs_r[:, None] * in_features + offs_i[None, :], mask=inside, other=0.0)
    s = tl.load(style_ptr + image * stride_sb + style_offset + offs_i, mask=inside_i, other=0.0)
    v = w * (s * (1.0 / tl.sqrt(in_features.to(tl.float32))))[None, :]
    d = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) + eps)
    d = tl.where(demodulate != 0, d, 1.0)
    m = v * d[:, None]
    out = mod_ptr + mod_offset + (image * rows + offs_r)[:, None] * row_stride + offs_i[None, :]
    tl.store(out, m.to(mod_ptr.dtype.element_ty), mask=inside_r[:, None] & (offs_i < row_stride)[None, :])


@triton.jit
def modulate_bwd_kernel(
    n_ptr, weight_ptr, style_ptr, stride_sb, grad_weight_ptr, style_part_ptr, table_ptr, batch, eps,
    ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """`dV = d (N - M sum_k N M)`, then `dW = c sum_b s dV` over all images, and each image's share of `ds = c sum_i W dV`
    from these ROWS rows: `style_part` `[programs, B, BLOCK_I]`."""
    program = tl.program_id(0).to(tl.int64)
    line = table_ptr + program * 8
    row0, rows, in_features = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    weight_offset, style_offset = tl.load(line + 3), tl.load(line + 4)
    mod_offset, row_stride, demodulate = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    offs_r = row0 + tl.arange(0, ROWS)
    offs_i = tl.arange(0, BLOCK_I)
    inside_r, inside_i = offs_r < rows, offs_i < in_features
    inside = inside_r[:, None] & inside_i[None, :]
    weight_at = weight_offset + offs_r[:, None] * in_features + offs_i[None, :]
    c = 1.0 / tl.sqrt(in_features.to(tl.float32))
    w = tl.load(weight_ptr + weight_at, mask=inside, other=0.0) * c
    dw = tl.zeros((ROWS, BLOCK_I), dtype=tl.float32)
    for b in range(batch):
        image = tl.full((), 1, tl.int64) * b
        s = tl.load(style_ptr + image * stride_sb + style_offset + offs_i, mask=inside_i, other=0.0)
        n_at = mod_offset + (image * rows + offs_r)[:, None] * row_stride + offs_i[None, :]
        n = tl.load(n_ptr + n_at, mask=inside, other=0.0)
        v = w * s[None, :]
        d = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) + eps)
        d = tl.where(demodulate != 0, d, 1.0)
        m = v * d[:, None]
        t = tl.where(demodulate != 0, tl.sum(n * m, axis=1), 0.0)
        dv = d[:, None] * (n - m * t[:, None])
        dw += c * s[None, :] * dv
        share = tl.sum(w * dv, axis=0)
        tl.store(style_part_ptr + (program * batch + image) * BLOCK_I + offs_i, share, mask=inside_i)
    tl.store(grad_weight_ptr + weight_at, dw, mask=inside)


@triton.jit
def modulate_style_sum_kernel(
    style_part_ptr, grad_style_ptr, stride_sb, spans_ptr, batch, BLOCK_I: tl.constexpr, CHUNK: tl.constexpr
):
    """Adds the shares of one matrix's programs: `spans` `[matrices, 4]` = first program, programs, I, style offset."""
    line = spans_ptr + tl.program_id(0).to(tl.int64) * 4
    first, count, in_features, style_offset = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    image = tl.program_id(1).to(tl.int64)
    offs_i = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = offs_i < in_features
    acc = tl.zeros((CHUNK,), dtype=tl.float32)
    for k in range(count.to(tl.int32)):
        row = (first + k) * batch + image
        acc += tl.load(style_part_ptr + row * BLOCK_I + offs_i, mask=inside, other=0.0)
    tl.store(grad_style_ptr + image * stride_sb + style_offset + offs_i, acc, mask=inside)
