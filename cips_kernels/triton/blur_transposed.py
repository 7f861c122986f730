"""The transpose of the filter before a stride of two: zeros between the pixels, then the filter."""

import triton
import triton.language as tl

from .blur import slope_at


@triton.jit
def _across(at, stride_gw, odd, inside_near, inside_far):
    """A row of the gradient, spread and filtered across, times 8."""
    g = tl.load(at, mask=inside_near, other=0.0).to(tl.float32)
    h = tl.load(at - stride_gw, mask=inside_far, other=0.0).to(tl.float32)
    return tl.where(odd, 3.0 * g + h, g + 3.0 * h)


@triton.jit
def blur_transposed_kernel(
    grad_ptr, stride_gb, stride_gh, stride_gw, stride_gc, mask_ptr, stride_mb, stride_mh, stride_mw, stride_mc, bias_ptr,
    out_ptr, stride_ob, stride_oh, stride_ow, stride_oc, height, width, grad_height, grad_width, channels, padding,
    tiles_c, tiles_w, strips, sums_ptr,
    AFTER: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr, SLOPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (image, strip of ROWS rows of the gradient, BLOCK_W columns of the result, BLOCK_C channels).

    Of the four taps a pixel meets two in each direction, the others fall on zeros: at t = pixel + padding, an even t has
    1 at t/2 and 3 before it, an odd one 3 and 1. A row of the gradient and the one before it make two rows of the result.
    SUMS: each program writes its result's sum a channel, `[programs, C]`.
    """
    pid = tl.program_id(0)
    tile_c, rest = pid % tiles_c, pid // tiles_c
    tile_w, rest = rest % tiles_w, rest // tiles_w
    strip, image = rest % strips, (rest // strips).to(tl.int64)
    offs_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_w = tile_w * BLOCK_W + tl.arange(0, BLOCK_W)
    inside_c = offs_c < channels
    inside_out = (offs_w < width)[:, None] & inside_c[None, :]
    bias = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + offs_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    near = (offs_w + padding) // 2
    odd = ((offs_w + padding) % 2)[:, None] == 1
    inside_near = ((near < grad_width)[:, None]) & inside_c[None, :]
    inside_far = ((near >= 1) & (near <= grad_width))[:, None] & inside_c[None, :]
    grad_ptr += image * stride_gb
    mask_ptr += image * stride_mb
    out_ptr += image * stride_ob
    columns = near.to(tl.int64)[:, None] * stride_gw + offs_c.to(tl.int64)[None, :] * stride_gc
    row = padding // 2 + strip * ROWS - 1
    there = (row >= 0) & (row < grad_height)
    above = grad_ptr + row.to(tl.int64) * stride_gh + columns
    before = _across(above, stride_gw, odd, inside_near & there, inside_far & there)
    sums = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    for _ in range(ROWS):
        row += 1
        there = row < grad_height
        at = grad_ptr + row.to(tl.int64) * stride_gh + columns
        across = _across(at, stride_gw, odd, inside_near & there, inside_far & there)
        for parity in tl.static_range(2):
            out_row = 2 * row + parity - padding
            y = (across + 3.0 * before if parity == 0 else 3.0 * across + before) * 0.015625
            inside = inside_out & (out_row >= 0) & (out_row < height)
            if AFTER:
                mask_row = mask_ptr + out_row.to(tl.int64) * stride_mh
                y *= slope_at(mask_row, stride_mw, stride_mc, bias, offs_w, offs_c, inside, SLOPE)
            to = out_ptr + out_row.to(tl.int64) * stride_oh + offs_w.to(tl.int64)[:, None] * stride_ow
            tl.store(to + offs_c.to(tl.int64)[None, :] * stride_oc, y, mask=inside)
            sums += tl.where(inside, y, 0.0)
        before = across
    if SUMS:
        part = sums_ptr + (pid // tiles_c).to(tl.int64) * channels + offs_c
        tl.store(part, tl.sum(sums, axis=0), mask=inside_c)
