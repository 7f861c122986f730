"""The gradient of a ToRGB's modulated weight: `N_ci = sum_p drgb_pc x'_pi`, at the speed of reading `x'` once."""

import triton
import triton.language as tl


@triton.jit
def rgb_wgrad_kernel(
    drgb_ptr, stride_db, stride_dp, stride_dc, x_ptr, stride_xb, stride_xp, stride_xi, part_ptr,
    pixels, in_features, splits, pixels_per_split,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """`part` `[B, splits, CHANNELS, I]` float32, to be summed over splits.

    Few channels are no work for the matrix units: each thread keeps its own channel's sums over the rows it reads, and
    they are added across threads once at the end.
    """
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tile_i = pid % tiles_i
    split = (pid // tiles_i) % splits
    image = (pid // (tiles_i * splits)).to(tl.int64)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_i = offs_i < in_features
    first = split.to(tl.int64) * pixels_per_split
    last = tl.minimum(first + pixels_per_split, pixels)
    for c in tl.static_range(0, CHANNELS, 3):
        # up to three channels at a time share one reading of x
        acc0 = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
        acc1 = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
        acc2 = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
        for p in range(0, (last - first).to(tl.int32), BLOCK_P):
            offs_p = first + p + tl.arange(0, BLOCK_P)
            inside_p = offs_p < last
            x_tile = x_ptr + image * stride_xb + offs_p[:, None] * stride_xp + offs_i.to(tl.int64)[None, :] * stride_xi
            x = tl.load(x_tile, mask=inside_p[:, None] & inside_i[None, :], other=0.0).to(tl.float32)
            d = drgb_ptr + image * stride_db + offs_p * stride_dp
            acc0 += x * tl.load(d + c * stride_dc, mask=inside_p, other=0.0).to(tl.float32)[:, None]
            if c + 1 < CHANNELS:
                acc1 += x * tl.load(d + (c + 1) * stride_dc, mask=inside_p, other=0.0).to(tl.float32)[:, None]
            if c + 2 < CHANNELS:
                acc2 += x * tl.load(d + (c + 2) * stride_dc, mask=inside_p, other=0.0).to(tl.float32)[:, None]
        out = part_ptr + ((image * splits + split) * CHANNELS + c) * in_features + offs_i
        tl.store(out, tl.sum(acc0, axis=0), mask=inside_i)
        if c + 1 < CHANNELS:
            tl.store(out + in_features, tl.sum(acc1, axis=0), mask=inside_i)
        if c + 2 < CHANNELS:
            tl.store(out + 2 * in_features, tl.sum(acc2, axis=0), mask=inside_i)
