"""What the noise needs of the gradient: each pixel's sum over channels, weighed with its noise."""

import triton
import triton.language as tl


@triton.jit
def noise_bwd_kernel(
    rows_part_ptr, noise_ptr, stride_noise_b, strength_ptr, strength_part_ptr, grad_noise_ptr,
    batch, pixels, shares, GRAD_NOISE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`rows_p = sum_i u_pi` from its shares; a part of `dnu = sum_p n_p rows_p`, and `dn_p = nu rows_p`."""
    pid = tl.program_id(0)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    image = pid // tiles_p
    offs_p = (pid % tiles_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = offs_p < pixels
    rows = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for t in range(shares):
        at = (tl.full((), 1, tl.int64) * t * batch + image) * pixels + offs_p
        rows += tl.load(rows_part_ptr + at, mask=inside, other=0.0)
    n = tl.load(noise_ptr + image.to(tl.int64) * stride_noise_b + offs_p, mask=inside, other=0.0)
    tl.store(strength_part_ptr + pid, tl.sum(rows * n, axis=0))
    if GRAD_NOISE:
        tl.store(grad_noise_ptr + image.to(tl.int64) * pixels + offs_p, rows * tl.load(strength_ptr), mask=inside)
