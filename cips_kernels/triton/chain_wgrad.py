"""The weight gradients of a run of layers and several images in one launch: `wgrad` where few images are at hand.

One launch a layer would leave multiprocessors idle or cut every sum into pieces. Here each program walks over its share of
all sums (`teams`), and only those sums are cut that begin in one share and end in another.
"""

import triton
import triton.language as tl

from .fragment import natural, natural_columns
from .teams import first_block, piece_number


@triton.jit(do_not_specialize=["x_step", "images", "pixels", "total", "teams"])
def modfc_wgrad_chain_kernel(
    u_desc, x_desc, x_step, n_ptr, offsets_ptr, stride_no, piece_ptr,
    images, pixels, in_features, out_features, total, teams, scale,
    FRAGMENT_O: tl.constexpr, FRAGMENT_I: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`u` `[L, n, P, O]`, `x` `[L, n, P, I]` -> `scale u^T x` of matrix `m = l n + image` at `n_ptr + offsets[m]`.

    `x_step` is 0 where the images of a layer share one `x`. Sums that other programs share in go to `piece`
    `[programs, 2, BLOCK_O, BLOCK_I]` instead, in natural order and scaled too.
    """
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles = tl.cdiv(out_features, BLOCK_O) * tiles_i
    tile, team = pid % tiles, pid // tiles
    o0, i0 = (tile // tiles_i) * BLOCK_O, (tile % tiles_i) * BLOCK_I
    blocks = tl.cdiv(pixels, BLOCK_P)
    start, end = first_block(team, total, teams), first_block(team + 1, total, teams)
    for matrix in range(start // blocks, tl.cdiv(end, blocks)):
        begin = tl.maximum(start - matrix * blocks, 0)
        stop = tl.minimum(end - matrix * blocks, blocks)
        layer, image = matrix // images, matrix % images
        acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for p in range(begin * BLOCK_P, stop * BLOCK_P, BLOCK_P):
            a = u_desc.load([layer, image, p, o0]).reshape(BLOCK_P, BLOCK_O)
            b = x_desc.load([layer, image * x_step, p, i0]).reshape(BLOCK_P, BLOCK_I)
            acc = tl.dot(a.T, b, acc)
        if stop - begin == blocks:
            row = stride_no
            n_tile = n_ptr + tl.multiple_of(tl.load(offsets_ptr + matrix), 16) + o0 * stride_no + i0
        else:
            row = BLOCK_I
            n_tile = piece_ptr + piece_number(team, tile, tiles, begin).to(tl.int64) * (BLOCK_O * BLOCK_I)
        # The columns change places as values, not as addresses: stored as vectors they need a fourth of the addresses, which
        # the compiler keeps in registers all along the sum (they spilled).
        rows, cols = natural(tl.arange(0, BLOCK_O), FRAGMENT_O), tl.arange(0, BLOCK_I)
        acc = natural_columns(acc, BLOCK_O, BLOCK_I, FRAGMENT_I)
        inside = (o0 + rows < out_features)[:, None] & (i0 + cols < in_features)[None, :]
        tl.store(n_tile + rows[:, None] * row + cols[None, :], acc * scale, mask=inside)
