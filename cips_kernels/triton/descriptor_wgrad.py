"""The weight gradient for GPUs with a tensor copy engine (compute capability 9.0): the same sums as `wgrad`."""

import triton
import triton.language as tl

from .fragment import natural


@triton.jit(do_not_specialize=["x_step"])
def modfc_wgrad_descriptor_kernel(
    u_desc, x_desc, x_step, n_ptr, stride_ns, stride_nb, stride_no,
    pixels, in_features, out_features, splits, pixels_per_split, scale,
    FRAGMENT_O: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`n[split, b] = scale u^T x` over the split's pixels; what lies past the image is read as zero."""
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    tile_i = pid % tiles_i
    tile_o = (pid // tiles_i) % tiles_o
    split = (pid // (tiles_i * tiles_o)) % splits
    image = pid // (tiles_i * tiles_o * splits)
    first = split * pixels_per_split
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for p in range(first, tl.minimum(first + pixels_per_split, pixels), BLOCK_P):
        a = u_desc.load([image, p, tile_o * BLOCK_O]).reshape(BLOCK_P, BLOCK_O)
        b = x_desc.load([image * x_step, p, tile_i * BLOCK_I]).reshape(BLOCK_P, BLOCK_I)
        acc = tl.dot(a.T, b, acc)
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    n_tile = n_ptr + split.to(tl.int64) * stride_ns + image.to(tl.int64) * stride_nb
    inside = (offs_o < out_features)[:, None] & (offs_i < in_features)[None, :]
    offs_o = natural(offs_o, FRAGMENT_O)
    n_tile += offs_o.to(tl.int64)[:, None] * stride_no + offs_i[None, :]
    tl.store(n_tile, acc * scale, mask=inside)
