"""From the gradient of a layer's output to that of its input, and on through the activation below.

`h = u M` (plus `dRGB R` where a ToRGB read the same features), then, while the tile is still in registers, the mask of
the layer below: `u' = g h (1 or slope)`, of which only the sign of that layer's output is needed. With a sine its sums are
read instead, `u' = g h cos(y)`, and the output, which a weight gradient reads, is made of them again. What its bias and
its noise strength need of `u'` goes out as partial sums of each tile, added up afterwards in a fixed order.
"""

import triton
import triton.language as tl

from .rgb import add_rgb_grad
from .rounding import add_product, operand
from .waves import activate_backward


@triton.jit
def _finish(
    h, act_tile, inside, image, tile_p, tiles_p, tile_i, offs_p, offs_i, inside_p, inside_i,
    drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
    u_ptr, made_ptr, bias_part_ptr, rows_part_ptr,
    batch, pixels, in_features, evens, negative_slope, gain,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, MADE: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The tail shared by the product kernel and by the head of the chain, which has no product."""
    BLOCK_P: tl.constexpr = h.shape[0]
    act = tl.load(act_tile, mask=inside, other=0.0)
    global_tile = (image * tiles_p + tile_p).to(tl.int64)
    h = add_rgb_grad(
        h, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
        image, offs_p, offs_i, inside_p, inside_i, CHANNELS,
    )  # fmt: skip
    u, made = activate_backward(h, act, offs_i, evens, negative_slope, gain, ACTIVATION, FAST)
    first = (image.to(tl.int64) * pixels + tile_p * BLOCK_P) * in_features
    at = tl.arange(0, BLOCK_P)[:, None] * in_features + offs_i[None, :]
    tl.store(u_ptr + first + at, u.to(u_ptr.dtype.element_ty), mask=inside)
    if MADE:
        tl.store(made_ptr + first + at, made.to(made_ptr.dtype.element_ty), mask=inside)
    if PARTS:
        u = tl.where(inside_p[:, None], u, 0.0)
        tl.store(bias_part_ptr + global_tile * in_features + offs_i, tl.sum(u, axis=0), mask=inside_i)
        u = tl.where(inside_i[None, :], u, 0.0)
        rows = (tile_i.to(tl.int64) * batch + image) * pixels + offs_p
        tl.store(rows_part_ptr + rows, tl.sum(u, axis=1), mask=inside_p)


@triton.jit
def modfc_dgrad_kernel(
    u_ptr, m_ptr, stride_mb, stride_mo,
    act_ptr,
    drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
    out_ptr, made_ptr, bias_part_ptr, rows_part_ptr,
    batch, pixels, in_features, out_features, evens, negative_slope, gain,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, MADE: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`u` `[B, P, O]` of a layer -> `u` `[B, P, I]` of the layer below, whose output `act` `[B, P, I]` was this one's input.

    With a sine `act` has the layer's sums; MADE: its output goes to `made` `[B, P, I]`.
    """
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
    u_tile = u_ptr + (image.to(tl.int64) * pixels + p0) * out_features + rows[:, None] * out_features + offs_o[None, :]
    # rows of M have room to a multiple of 16: columns past the end are read only inside that room
    m_tile = m_ptr + image.to(tl.int64) * stride_mb + offs_o[:, None] * stride_mo + offs_i[None, :]
    h = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    for k in range(0, out_features, BLOCK_O):
        inside_k = k + offs_o < out_features
        if EVEN_K:
            a = tl.load(u_tile)
            b = tl.load(m_tile, mask=inside_i[None, :], other=0.0)
        else:
            a = tl.load(u_tile, mask=inside_k[None, :], other=0.0)
            b = tl.load(m_tile, mask=inside_k[:, None] & inside_i[None, :], other=0.0)
        a, b = operand(a, PRECISION, UPCAST), operand(b, PRECISION, UPCAST)
        h = add_product(a, b, h, PRECISION)
        u_tile += BLOCK_O
        m_tile += BLOCK_O * stride_mo
    act_tile = act_ptr + (image.to(tl.int64) * pixels + offs_p)[:, None] * in_features + offs_i[None, :]
    _finish(
        h, act_tile, inside_p[:, None] & inside_i[None, :], image, tile_p, tiles_p, tile_i, offs_p, offs_i,
        inside_p, inside_i, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
        out_ptr, made_ptr, bias_part_ptr, rows_part_ptr, batch, pixels, in_features, evens, negative_slope, gain,
        CHANNELS, PARTS, MADE, ACTIVATION, FAST,
    )  # fmt: skip


@triton.jit
def modfc_head_kernel(
    grad_ptr, stride_gb, stride_gp, stride_gi,
    act_ptr, stride_ab, stride_ap, stride_ai,
    drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
    out_ptr, bias_part_ptr, rows_part_ptr,
    batch, pixels, in_features, evens, negative_slope, gain,
    GRAD: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The start of the chain: `u` of the last layer from the gradients of the features and of the RGB sum."""
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    tile_i = pid % tiles_i
    tile_p = (pid // tiles_i) % tiles_p
    image = pid // (tiles_i * tiles_p)
    offs_p = tile_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_p, inside_i = offs_p < pixels, offs_i < in_features
    inside = inside_p[:, None] & inside_i[None, :]
    wide_i = offs_i.to(tl.int64)
    h = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
    if GRAD:
        grad_tile = grad_ptr + image.to(tl.int64) * stride_gb + offs_p[:, None] * stride_gp + wide_i[None, :] * stride_gi
        h += tl.load(grad_tile, mask=inside, other=0.0).to(tl.float32)
    act_tile = act_ptr + image.to(tl.int64) * stride_ab + offs_p[:, None] * stride_ap + wide_i[None, :] * stride_ai
    _finish(
        h, act_tile, inside, image, tile_p, tiles_p, tile_i, offs_p, offs_i,
        inside_p, inside_i, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
        out_ptr, out_ptr, bias_part_ptr, rows_part_ptr, batch, pixels, in_features, evens, negative_slope, gain,
        CHANNELS, PARTS, False, ACTIVATION, FAST,
    )  # fmt: skip
