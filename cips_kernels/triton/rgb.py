"""The ToRGBs by themselves: a projection that reads the stack's input, and the last sum over partial shares."""

import triton
import triton.language as tl

from .rounding import add_product, operand


@triton.jit
def rgb_fwd_kernel(
    x_ptr, stride_xb, stride_xp, stride_xi, m_ptr, stride_mb, stride_mc, rgb_part_ptr,
    pixels, in_features, channels,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`R x` as one share of the RGB sum; for a ToRGB that no layer's kernel carries."""
    pid = tl.program_id(0)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    image = (pid // tiles_p).to(tl.int64)
    offs_p = (pid % tiles_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_i, offs_c = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_C)
    inside_p, inside_c = offs_p < pixels, offs_c < channels
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_I):
        offs_k = k + offs_i
        inside_k = offs_k < in_features
        a_tile = x_ptr + image * stride_xb + offs_p[:, None] * stride_xp + offs_k.to(tl.int64)[None, :] * stride_xi
        a = tl.load(a_tile, mask=inside_p[:, None] & inside_k[None, :], other=0.0)
        b_tile = m_ptr + image * stride_mb + offs_c[:, None] * stride_mc + offs_k[None, :]
        b = tl.load(b_tile, mask=inside_c[:, None] & inside_k[None, :], other=0.0)
        a, b = operand(a, PRECISION, UPCAST), operand(b, PRECISION, UPCAST)
        acc = add_product(a, tl.trans(b), acc, PRECISION)
    part = rgb_part_ptr + (image * pixels + offs_p)[:, None] * channels + offs_c[None, :]
    inside = inside_p[:, None] & inside_c[None, :]
    tl.store(part, acc, mask=inside)


@triton.jit
def rgb_sum_kernel(
    part_ptr, bias_ptr, skip_ptr, stride_sb, stride_sp, stride_sc, out_ptr, stride_ob, stride_op, stride_oc,
    batch, pixels, channels, shares, n_biases,
    SKIP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`rgb = skip + sum of shares + sum of biases`, in that order."""
    pid = tl.program_id(0)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    image = (pid // tiles_p).to(tl.int64)
    offs_p = (pid % tiles_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, BLOCK_C)
    inside = (offs_p < pixels)[:, None] & (offs_c < channels)[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    if SKIP:
        skip = skip_ptr + image * stride_sb + offs_p[:, None] * stride_sp + offs_c[None, :] * stride_sc
        acc += tl.load(skip, mask=inside, other=0.0).to(tl.float32)
    for t in range(shares):
        row = (tl.full((), 1, tl.int64) * t * batch + image) * pixels + offs_p
        acc += tl.load(part_ptr + row[:, None] * channels + offs_c[None, :], mask=inside, other=0.0)
    for k in range(n_biases):
        acc += tl.load(bias_ptr + k * channels + offs_c, mask=offs_c < channels, other=0.0)[None, :]
    out = out_ptr + image * stride_ob + offs_p[:, None] * stride_op + offs_c.to(tl.int64)[None, :] * stride_oc
    tl.store(out, acc, mask=inside)


@triton.jit
def _add_channel(
    h, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc, image, offs_p, offs_i, inside_p, inside_i, c
):
    d_at = drgb_ptr + image.to(tl.int64) * stride_db + offs_p * stride_dp + c * stride_dc
    r_at = rgb_m_ptr + image.to(tl.int64) * stride_rb + c * stride_rc + offs_i
    d = tl.load(d_at, mask=inside_p, other=0.0).to(tl.float32)
    r = tl.load(r_at, mask=inside_i, other=0.0).to(tl.float32)
    return h + d[:, None] * r[None, :]


@triton.jit
def add_rgb_grad(
    h, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc, image, offs_p, offs_i, inside_p, inside_i,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """`h + dRGB R` for a tile of one image: three multiply-adds an element are cheaper than a padded product."""
    if CHANNELS <= 4:
        for c in tl.static_range(CHANNELS):
            h = _add_channel(
                h, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
                image, offs_p, offs_i, inside_p, inside_i, c,
            )  # fmt: skip
    else:
        for c in range(CHANNELS):
            h = _add_channel(
                h, drgb_ptr, stride_db, stride_dp, stride_dc, rgb_m_ptr, stride_rb, stride_rc,
                image, offs_p, offs_i, inside_p, inside_i, c,
            )  # fmt: skip
    return h
