"""The second part of `chain_wgrad`: the pieces of every cut matrix, added in the order of its pixels."""

import triton
import triton.language as tl

from .teams import first_block, piece_number, team_of


@triton.jit(do_not_specialize=["blocks", "total", "teams"])
def modfc_wgrad_chain_sum_kernel(
    piece_ptr, n_ptr, offsets_ptr, stride_no, in_features, out_features, blocks, total, teams,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`piece` `[programs, 2, BLOCK_O, BLOCK_I]` -> matrix `m` at `n_ptr + offsets[m]`.

    A program looks at the cut before one team and at ROWS rows of one tile: the first cut within a matrix is that which
    adds it up.
    """
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(in_features, BLOCK_I)
    tiles = tl.cdiv(out_features, BLOCK_O) * tiles_i
    part, tile = pid % (BLOCK_O // ROWS), (pid // (BLOCK_O // ROWS)) % tiles
    team = pid // (BLOCK_O // ROWS * tiles) + 1
    matrix = first_block(team, total, teams) // blocks
    if team_of(matrix * blocks, total, teams) == team - 1:
        rows, cols = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_I)
        offs_o, offs_i = (tile // tiles_i) * BLOCK_O + rows, (tile % tiles_i) * BLOCK_I + cols
        inside = (offs_o < out_features)[:, None] & (offs_i < in_features)[None, :]
        within = piece_ptr + rows[:, None] * BLOCK_I + cols[None, :]
        number = piece_number(team - 1, tile, tiles, 0).to(tl.int64)
        acc = tl.load(within + number * (BLOCK_O * BLOCK_I), mask=inside)
        for other in range(team, team_of((matrix + 1) * blocks - 1, total, teams) + 1):
            number = piece_number(other, tile, tiles, 1).to(tl.int64)
            acc += tl.load(within + number * (BLOCK_O * BLOCK_I), mask=inside)
        n_tile = n_ptr + tl.multiple_of(tl.load(offsets_ptr + matrix), 16)
        n_tile += offs_o.to(tl.int64)[:, None] * stride_no + offs_i[None, :]
        tl.store(n_tile, acc, mask=inside)
