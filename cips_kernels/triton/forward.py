"""One modulated layer: product, noise, bias, activation, and the ToRGB that reads it, in one kernel.

A program owns BLOCK_P pixels of one image and BLOCK_O output channels. The ToRGB needs every channel of a pixel, so each
channel block leaves its share, and a last small kernel adds the shares of all ToRGBs in a fixed order: no atomics, the
same bits every run.
"""

import triton
import triton.language as tl

from .rounding import add_product, operand
from .waves import activate


@triton.jit
def modfc_fwd_kernel(
    x_ptr, stride_xb, stride_xp, stride_xi,
    m_ptr, stride_mb, stride_mo,
    bias_ptr, strength_ptr, noise_ptr, stride_noise_b,
    out_ptr, stride_ob, stride_op, stride_oo, sums_ptr,
    rgb_m_ptr, stride_rb, stride_rc, rgb_part_ptr,
    batch, pixels, in_features, out_features, channels, evens, negative_slope, gain,
    NOISE: tl.constexpr, RGB: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    X_WIDE: tl.constexpr, OUT_WIDE: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """SUMS: what the activation reads is kept too, in `sums` `[B, P, O]`, contiguous. `evens`: see `activate`."""
    pid = tl.program_id(0)
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    tile_o = pid % tiles_o  # neighbours share the pixels, which then come from L2
    tile_p = (pid // tiles_o) % tiles_p
    image = pid // (tiles_o * tiles_p)
    p0 = tile_p.to(tl.int64) * BLOCK_P

    offs_p = p0 + tl.arange(0, BLOCK_P)
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    # rows past the end are clamped, not masked: their results are never stored, and the loads stay whole vectors
    rows = tl.minimum(offs_p, pixels - 1)
    cols = tl.minimum(offs_o, out_features - 1)
    if X_WIDE:  # channels lie far apart: their offsets need 64 bits
        x_tile = x_ptr + image.to(tl.int64) * stride_xb + rows[:, None] * stride_xp + offs_i.to(tl.int64)[None, :] * stride_xi
        step = tl.full((), BLOCK_I, tl.int64) * stride_xi
    else:
        x_base = x_ptr + image.to(tl.int64) * stride_xb + p0 * stride_xp
        x_tile = x_base + (rows - p0).to(tl.int32)[:, None] * stride_xp + offs_i[None, :] * stride_xi
        step = BLOCK_I * stride_xi
    m_tile = m_ptr + image.to(tl.int64) * stride_mb + cols[:, None] * stride_mo + offs_i[None, :]

    if NOISE:  # asked for before the sum, so that it is there after it
        n = tl.load(noise_ptr + image.to(tl.int64) * stride_noise_b + rows)
        noise = tl.load(strength_ptr) * n
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_I):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(m_tile)
        else:
            inside = k + offs_i < in_features
            a = tl.load(x_tile, mask=inside[None, :], other=0.0)
            b = tl.load(m_tile, mask=inside[None, :], other=0.0)
        a, b = operand(a, PRECISION, UPCAST), operand(b, PRECISION, UPCAST)
        acc = add_product(a, tl.trans(b), acc, PRECISION)
        x_tile += step
        m_tile += BLOCK_I

    inside_o = offs_o < out_features
    inside_p = offs_p < pixels
    bias = tl.load(bias_ptr + offs_o, mask=inside_o, other=0.0)
    y = acc + bias[None, :]
    if NOISE:
        y += noise[:, None]
    if SUMS:
        sums_tile = sums_ptr + (image.to(tl.int64) * pixels + offs_p)[:, None] * out_features + offs_o[None, :]
        tl.store(sums_tile, y.to(sums_ptr.dtype.element_ty), mask=inside_p[:, None] & inside_o[None, :])
    out = activate(y, offs_o, evens, negative_slope, gain, ACTIVATION, FAST).to(out_ptr.dtype.element_ty)
    if STORE:
        out_tile = out_ptr + image.to(tl.int64) * stride_ob + offs_p[:, None] * stride_op
        if OUT_WIDE:
            out_tile += offs_o.to(tl.int64)[None, :] * stride_oo
        else:
            out_tile += offs_o[None, :] * stride_oo
        tl.store(out_tile, out, mask=inside_p[:, None] & inside_o[None, :])
    if RGB:
        offs_c = tl.arange(0, BLOCK_C)
        inside_c = offs_c < channels
        r_tile = rgb_m_ptr + image.to(tl.int64) * stride_rb + offs_c[:, None] * stride_rc + offs_o[None, :]
        r = tl.load(r_tile, mask=inside_c[:, None] & inside_o[None, :], other=0.0)
        out, r = operand(out, PRECISION, UPCAST), operand(r, PRECISION, UPCAST)
        share = tl.dot(out, tl.trans(r), input_precision=PRECISION)
        row = (tile_o.to(tl.int64) * batch + image) * pixels + offs_p
        part = rgb_part_ptr + row[:, None] * channels + offs_c[None, :]
        inside = inside_p[:, None] & inside_c[None, :]
        tl.store(part, share, mask=inside)
