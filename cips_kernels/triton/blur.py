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
        x = tl.where(x > 0.0, x, SLOPE * x)
        # the padding lies behind the activation: there it is zero, not the bias
        x = tl.where(inside, x, 0.0)
    elif BEFORE == "slope":
        x *= slope_at(mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside, SLOPE)
    return x


@triton.jit
def _row(
    x_ptr, stride_xw, stride_xc, mask_ptr, stride_mw, stride_mc, bias, first_w, offs_c, inside_row, inside_c, width,
    BEFORE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """One row of the image filtered across, times 8."""
    for j in tl.static_range(4):
        offs_w = first_w + j
        inside = ((offs_w >= 0) & (offs_w < width) & inside_row)[:, None] & inside_c[None, :]
        x = _tap(
            x_ptr, stride_xw, stride_xc, mask_ptr, stride_mw, stride_mc, bias, offs_w, offs_c, inside, BEFORE, SLOPE
        )
        if j == 0:
            across = x
        elif j == 3:
            across += x
        else:
            across += 3.0 * x
    return across


@triton.jit
def blur_kernel(
    x_ptr, stride_xb, stride_xh, stride_xw, stride_xc, mask_ptr, stride_mb, stride_mh, stride_mw, stride_mc, bias_ptr,
    out_ptr, stride_ob, stride_oh, stride_ow, stride_oc, height, width, out_height, out_width, channels, padding,
    tiles_c, tiles_w, strips,
    STRIDE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BIAS: tl.constexpr, SLOPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (image, strip of ROWS rows of the result, BLOCK_W columns, BLOCK_C channels).

    It walks down the image and keeps the last four rows, filtered across, in registers: every element is read from
    memory once, and 4 (1 + 3 / ROWS) times from the first cache instead of 16.

    BEFORE: "none", "lrelu" (of x + bias) or "slope" (times its derivative at mask + bias); AFTER: whether the result is
    multiplied by the derivative at mask + bias.
    """
    pid = tl.program_id(0)
    tile_c, rest = pid % tiles_c, pid // tiles_c
    tile_w, rest = rest % tiles_w, rest // tiles_w
    strip, image = rest % strips, (rest // strips).to(tl.int64)
    offs_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_w = tile_w * BLOCK_W + tl.arange(0, BLOCK_W)
    inside_c = offs_c < channels
    inside_out = (offs_w < out_width)[:, None] & inside_c[None, :]
    bias = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + offs_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    first_row, first_w = strip * ROWS, offs_w * STRIDE - padding
    x_ptr += image * stride_xb
    mask_ptr += image * stride_mb
    out_ptr += image * stride_ob
    a = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    b, c, d = a, a, a
    for r in tl.static_range(STRIDE * (ROWS - 1) + 4):
        row = first_row * STRIDE - padding + r
        across = _row(
            x_ptr + row.to(tl.int64) * stride_xh, stride_xw, stride_xc,
            mask_ptr + row.to(tl.int64) * stride_mh, stride_mw, stride_mc,
            bias, first_w, offs_c, (row >= 0) & (row < height), inside_c, width, BEFORE, SLOPE,
        )  # fmt: skip
        a, b, c, d = b, c, d, across
        if r >= 3 and (r - 3) % STRIDE == 0:
            out_row = first_row + (r - 3) // STRIDE
            y = ((a + d) + 3.0 * (b + c)) * 0.015625
            inside = inside_out & (out_row < out_height)
            if AFTER:
                mask_row = mask_ptr + out_row.to(tl.int64) * stride_mh
                y *= slope_at(mask_row, stride_mw, stride_mc, bias, offs_w, offs_c, inside, SLOPE)
            at = out_ptr + out_row.to(tl.int64) * stride_oh + offs_w.to(tl.int64)[:, None] * stride_ow
            tl.store(at + offs_c.to(tl.int64)[None, :] * stride_oc, y, mask=inside)
