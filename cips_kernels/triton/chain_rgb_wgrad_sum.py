"""The second part of `chain_rgb_wgrad`: the splits added up in order, each channel to where it belongs."""

import triton
import triton.language as tl

from .fragment import natural


@triton.jit(do_not_specialize=["images", "splits", "widest"])
def rgb_wgrad_chain_sum_kernel(
    part_ptr, out_ptr, table_ptr, images, splits, widest, scale,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """`part` `[K, images, splits, CHANNELS, widest]` in fragment order -> `scale` times its sums over splits at
    `out + offset + (image CHANNELS + c) row`, in natural order; `table` as in `layers.rgb_wgrad_chain`."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(widest, BLOCK_I)
    channel, matrix = (pid // tiles) % CHANNELS, pid // (tiles * CHANNELS)
    rgb, image = matrix // images, matrix % images
    offs_i = (pid % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    width = tl.load(table_ptr + rgb * 4 + 1).to(tl.int32)
    offset, row = tl.load(table_ptr + rgb * 4 + 2), tl.load(table_ptr + rgb * 4 + 3)
    part = part_ptr + (matrix.to(tl.int64) * splits * CHANNELS + channel) * widest + offs_i
    acc = tl.zeros((BLOCK_S, BLOCK_I), dtype=tl.float32)
    for s in range(0, splits, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        inside = (offs_s < splits)[:, None] & (offs_i < width)[None, :]
        acc += tl.load(part[None, :] + offs_s.to(tl.int64)[:, None] * (CHANNELS * widest), mask=inside, other=0.0)
    out = out_ptr + offset + (image * CHANNELS + channel) * row + natural(offs_i, True)
    tl.store(out, tl.sum(acc, axis=0) * scale, mask=offs_i < width)
