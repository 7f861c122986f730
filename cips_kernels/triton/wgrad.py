"""The gradient of each image's modulated weight: `N = u^T x`, a sum over pixels.

One program owns a tile of one image's matrix and a range of its pixels. Few images leave multiprocessors idle, so the
pixels are then split, and the splits are added in a fixed order: the same bits every run.
"""

import triton
import triton.language as tl

from .fragment import natural
from .rounding import add_product, operand


@triton.jit
def modfc_wgrad_kernel(
    u_ptr, stride_ub, stride_up, stride_uo,
    x_ptr, stride_xb, stride_xp, stride_xi,
    n_ptr, stride_ns, stride_nb, stride_no,
    pixels, in_features, out_features, splits, pixels_per_split, scale,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    FRAGMENT_O: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`u` `[B, P, O]`, `x` `[B, P, I]` (any strides) -> `n[split, b]` `[O, I]` float32, times `scale`.

    FRAGMENT_O: the channels of `u` lie in fragment order; those of `n` never do.
    """
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    tile_i = pid % tiles_i  # the tiles of one image and split run together and share u and x in L2
    tile_o = (pid // tiles_i) % tiles_o
    split = (pid // (tiles_i * tiles_o)) % splits
    image = (pid // (tiles_i * tiles_o * splits)).to(tl.int64)
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_p = tl.arange(0, BLOCK_P)
    inside_o, inside_i = offs_o < out_features, offs_i < in_features
    first = split.to(tl.int64) * pixels_per_split
    last = tl.minimum(first + pixels_per_split, pixels)
    # columns past the end are clamped: they give rows and columns of N that are never stored
    cols_o = tl.minimum(offs_o, out_features - 1).to(tl.int64)
    cols_i = tl.minimum(offs_i, in_features - 1).to(tl.int64)
    u_tile = u_ptr + image * stride_ub + (first + offs_p)[:, None] * stride_up
    x_tile = x_ptr + image * stride_xb + (first + offs_p)[:, None] * stride_xp
    if EVEN:
        u_tile += offs_o[None, :] * stride_uo
        x_tile += offs_i[None, :] * stride_xi
    else:
        u_tile += cols_o[None, :] * stride_uo
        x_tile += cols_i[None, :] * stride_xi
    step_u = tl.full((), BLOCK_P, tl.int64) * stride_up
    step_x = tl.full((), BLOCK_P, tl.int64) * stride_xp
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for p in range(0, (last - first).to(tl.int32), BLOCK_P):
        if EVEN:
            a = tl.load(u_tile)
            b = tl.load(x_tile)
        else:
            inside_p = first + p + offs_p < last
            a = tl.load(u_tile, mask=inside_p[:, None], other=0.0)
            b = tl.load(x_tile, mask=inside_p[:, None], other=0.0)
        a, b = operand(a, PRECISION, UPCAST), operand(b, PRECISION, UPCAST)
        acc = add_product(tl.trans(a), b, acc, PRECISION)
        u_tile += step_u
        x_tile += step_x
    n_tile = n_ptr + split.to(tl.int64) * stride_ns + image * stride_nb
    offs_o = natural(offs_o, FRAGMENT_O)
    n_tile += offs_o.to(tl.int64)[:, None] * stride_no + offs_i[None, :]
    tl.store(n_tile, acc * scale, mask=inside_o[:, None] & inside_i[None, :])
