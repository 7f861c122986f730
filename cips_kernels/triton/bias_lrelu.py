"""A convolution's tail: bias, leaky ReLU and what is added behind it, in one pass; and the derivative's."""

import triton
import triton.language as tl


@triton.jit
def bias_lrelu_kernel(
    x_ptr, at_ptr, bias_ptr, residual_ptr, out_ptr, rows, channels,
    BACKWARD: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SLOPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`lrelu(x + bias) (+ residual)` over `rows` pixels of `channels` adjacent values; BACKWARD: `x` is a gradient, and is
    multiplied by the slope at `at + bias`."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    offs_p = (pid // tiles_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (offs_p < rows)[:, None] & (offs_c < channels)[None, :]
    offs = offs_p[:, None] * channels + offs_c[None, :]
    bias = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + offs_c, mask=offs_c < channels, other=0.0).to(tl.float32)[None, :]
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
