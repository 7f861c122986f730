"""The filter [1,3,3,1] x [1,3,3,1] / 64 before a stride, with a leaky ReLU before it or its slope after it."""

import triton
import triton.language as tl


@triton.jit
def slope_at(mask_ptr, stride_w, stride_c, bias, offs_w, offs_c, inside, SLOPE: tl.constexpr):
    """1 where `mask + bias > 0`, the negative slope elsewhere: the derivative of the leaky ReLU, one image's row."""
    at = mask_ptr + offs_w.to(tl.int64)[:, None] * stride_w + offs_c.to(tl.int64)[None, :] * stride_c
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32) + bias
    return tl.where(y > 0.0, 1.0, SLOPE)


@triton.jit
def _tap(
    x_ptr, stride_xw, stride_xc, mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside,
    BEFORE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    at = x_ptr + offs_w.to(tl.int64)[:, None] * stride_xw + offs_c.to(tl.int64)[None, :] * stride_xc
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if BEFORE == "lrelu":
        x += bias
        x = tl.maximum(x, SLOPE * x) if SLOPE <= 1.0 else tl.minimum(x, SLOPE * x)
        # the padding lies behind the activation: there it is zero, not the bias
        x = tl.where(inside, x, 0.0)
    elif BEFORE == "slope":
        x *= slope_at(mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside, SLOPE)
    return x


@triton.jit
def _row(
    x_ptr, stride_xw, stride_xc, mask_ptr, stride_mw, stride_mc, bias, first_w, offs_c, inside_row, inside_c, width,
    STRIDE: tl.constexpr, BEFORE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """One row of the image filtered across for two neighbours, times 8."""
    for j in tl.static_range(4 + STRIDE):
        offs_w = first_w + j
        inside = ((offs_w >= 0) & (offs_w < width) & inside_row)[:, None] & inside_c[None, :]
        x = _tap(
            x_ptr, stride_xw, stride_xc, mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside, BEFORE, SLOPE
        )
        if j == 0:
            left = x
        elif j < 3:
            left += 3.0 * x
        elif j == 3:
            left += x
        if j == STRIDE:
            right = x
        elif j > STRIDE:
            right += (3.0 * x) if j < STRIDE + 3 else x
    return left, right


@triton.jit
def _emit(
    a, b, c, d, out_ptr, stride_ow, stride_oc, mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside,
    AFTER: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Four rows filtered across become pixels of the result, which are returned, too, zero outside."""
    y = ((a + d) + 3.0 * (b + c)) * 0.015625
    if AFTER:
        y *= slope_at(mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside, SLOPE)
    at = out_ptr + offs_w.to(tl.int64)[:, None] * stride_ow + offs_c.to(tl.int64)[None, :] * stride_oc
    tl.store(at, y, mask=inside)
    return tl.where(inside, y, 0.0)


@triton.jit
def blur_kernel(
    x_ptr, stride_xb, stride_xh, stride_xw, stride_xc, mask_ptr, stride_mb, stride_mh, stride_mw, stride_mc, bias_ptr,
    out_ptr, stride_ob, stride_oh, stride_ow, stride_oc, height, width, out_height, out_width, channels, padding,
    tiles_c, tiles_w, strips, sums_ptr,
    STRIDE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (image, strip of ROWS rows of the result, BLOCK_W pairs of columns, BLOCK_C channels).

    It walks down the image and keeps the last four rows, filtered across, in registers: every element is read from
    memory once, and 2.5 (1 + 3 / ROWS) times from the first cache instead of 16. A thread has two neighbours to share
    what they both read: with one alone the activation, done four times an element, took longer than the memory.

    BEFORE: "none", "lrelu" (of x + bias) or "slope" (times its derivative at mask + bias); AFTER: whether the result is
    multiplied by the derivative at mask + bias. SUMS: each program writes its result's sum a channel, `[programs, C]`.
    """
    pid = tl.program_id(0)
    tile_c, rest = pid % tiles_c, pid // tiles_c
    tile_w, rest = rest % tiles_w, rest // tiles_w
    strip, image = rest % strips, (rest // strips).to(tl.int64)
    offs_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    left_w = (tile_w * BLOCK_W + tl.arange(0, BLOCK_W)) * 2
    right_w = left_w + 1
    inside_c = offs_c < channels
    inside_left = (left_w < out_width)[:, None] & inside_c[None, :]
    inside_right = (right_w < out_width)[:, None] & inside_c[None, :]
    bias = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + offs_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    first_row, first_w = strip * ROWS, left_w * STRIDE - padding
    x_ptr += image * stride_xb
    mask_ptr += image * stride_mb
    out_ptr += image * stride_ob
    a = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    b, c, d = a, a, a
    e, f, g, h = a, a, a, a
    sums = a
    row = first_row * STRIDE - padding
    for _ in tl.static_range(4 - STRIDE):
        left, right = _row(
            x_ptr + row.to(tl.int64) * stride_xh, stride_xw, stride_xc,
            mask_ptr + row.to(tl.int64) * stride_mh, stride_mw, stride_mc,
            bias, first_w, offs_c, (row >= 0) & (row < height), inside_c, width, STRIDE, BEFORE, SLOPE,
        )  # fmt: skip
        a, b, c, d = b, c, d, left
        e, f, g, h = f, g, h, right
        row += 1
    # not unrolled: it would be ten times the code, and stores keep the loads of later rows from moving up anyway
    for r in range(ROWS):
        for _ in tl.static_range(STRIDE):
            left, right = _row(
                x_ptr + row.to(tl.int64) * stride_xh, stride_xw, stride_xc,
                mask_ptr + row.to(tl.int64) * stride_mh, stride_mw, stride_mc,
                bias, first_w, offs_c, (row >= 0) & (row < height), inside_c, width, STRIDE, BEFORE, SLOPE,
            )  # fmt: skip
            a, b, c, d = b, c, d, left
            e, f, g, h = f, g, h, right
            row += 1
        out_row = first_row + r
        to = out_ptr + out_row.to(tl.int64) * stride_oh
        mask_row = mask_ptr + out_row.to(tl.int64) * stride_mh
        below = out_row < out_height
        sums += _emit(
            a, b, c, d, to, stride_ow, stride_oc, mask_row, stride_mw, stride_mc, bias, left_w, offs_c,
            inside_left & below, AFTER, SLOPE,
        )  # fmt: skip
        sums += _emit(
            e, f, g, h, to, stride_ow, stride_oc, mask_row, stride_mw, stride_mc, bias, right_w, offs_c,
            inside_right & below, AFTER, SLOPE,
        )  # fmt: skip
    if SUMS:
        part = sums_ptr + (pid // tiles_c).to(tl.int64) * channels + offs_c
        tl.store(part, tl.sum(sums, axis=0), mask=inside_c)
