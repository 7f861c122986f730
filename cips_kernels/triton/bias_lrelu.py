"""A convolution's tail: bias, leaky ReLU and what is added behind it, in one pass; and the derivative's."""

import triton
import triton.language as tl


@triton.jit
def bias_lrelu_kernel(
    x_ptr, at_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, rows, channels,
    BACKWARD: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr, SLOPE: tl.constexpr,
    REPEATS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`lrelu(x + bias) (+ residual)` over `rows` pixels of `channels` adjacent values; BACKWARD: `x` is a gradient, and is
    multiplied by the slope at `at + bias`. SUMS: each program writes its result's sum a channel, `[programs, C]`."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = offs_c < channels
    bias = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + offs_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for k in tl.static_range(REPEATS):
        offs_p = ((pid // tiles_c).to(tl.int64) * REPEATS + k) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (offs_p < rows)[:, None] & inside_c[None, :]
        offs = offs_p[:, None] * channels + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            y = tl.load(at_ptr + offs, mask=inside, other=0.0).to(tl.float32) + bias
            x = tl.where(y > 0.0, x, SLOPE * x)
        else:
            x += bias
            x = tl.where(x > 0.0, x, SLOPE * x)
        if RESIDUAL:
            x += tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, x, mask=inside)
        sums += tl.where(inside, x, 0.0)
    if SUMS:
        part = sums_ptr + (pid // tiles_c).to(tl.int64) * channels + offs_c
        tl.store(part, tl.sum(sums, axis=0), mask=inside_c)
