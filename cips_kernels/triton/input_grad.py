"""The gradient of the stack's input: `dx = u M`, summed over the images where all share one input."""

import triton
import triton.language as tl

from .rgb import add_rgb_grad
from .rounding import add_product, operand


@triton.jit
def modfc_dgrad_input_kernel(
    u_ptr, m_ptr, stride_mb, stride_mo,
    drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
    out_ptr, stride_ob, stride_op, stride_oi,
    pixels, in_features, out_features, summed,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, ADD: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`summed` images are added for each of the output's: 1, or all of them when the input is shared. ADD: to what the output
    holds."""
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    tile_i = pid % tiles_i
    tile_p = (pid // tiles_i) % tiles_p
    image = pid // (tiles_i * tiles_p)
    p0 = tile_p.to(tl.int64) * BLOCK_P
    offs_p = p0 + tl.arange(0, BLOCK_P)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    inside_p, inside_i = offs_p < pixels, offs_i < in_features
    rows = (tl.minimum(offs_p, pixels - 1) - p0).to(tl.int32)
    h = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    if DEPTH:
        blocks_o = tl.cdiv(out_features, BLOCK_O)
        for step in range(summed * blocks_o):
            b = (image * summed + step // blocks_o).to(tl.int64)
            k = (step % blocks_o) * BLOCK_O
            inside_k = k + offs_o < out_features
            u_tile = u_ptr + (b * pixels + p0) * out_features + k + rows[:, None] * out_features + offs_o[None, :]
            m_tile = m_ptr + b * stride_mb + k * stride_mo + offs_o[:, None] * stride_mo + offs_i[None, :]
            if EVEN_K:
                a = tl.load(u_tile)
                w = tl.load(m_tile, mask=inside_i[None, :], other=0.0)
            else:
                a = tl.load(u_tile, mask=inside_k[None, :], other=0.0)
                w = tl.load(m_tile, mask=inside_k[:, None] & inside_i[None, :], other=0.0)
            a, w = operand(a, PRECISION, UPCAST), operand(w, PRECISION, UPCAST)
            h = add_product(a, w, h, PRECISION)
    for s in range(summed):
        h = add_rgb_grad(
            h, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
            image * summed + s, offs_p, offs_i, inside_p, inside_i, CHANNELS,
        )  # fmt: skip
    out = out_ptr + image.to(tl.int64) * stride_ob + offs_p[:, None] * stride_op + offs_i.to(tl.int64)[None, :] * stride_oi
    inside = inside_p[:, None] & inside_i[None, :]
    if ADD:
        h += tl.load(out, mask=inside, other=0.0)
    tl.store(out, h.to(out_ptr.dtype.element_ty), mask=inside)
