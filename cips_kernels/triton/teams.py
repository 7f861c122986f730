"""How the weight gradients of many matrices are dealt to a fixed number of programs.

The programs that own the tiles of one matrix are a team and walk over its pixels together: a row of the operands is then
read from memory once, and for the other tiles from L2. (Tiles dealt one after the other to single programs would be at
other rows each, three times the traffic, and above what memory gives.) All blocks of pixels of all matrices form one
line, which is cut into as many equal ranges as there are teams. A matrix within one range is summed by one team; a cut
one is summed in pieces, which are added afterwards in the order of the line: the same bits every run.
"""

import triton
import triton.language as tl  # noqa: F401  Triton's interpreter looks for it beside what it runs


@triton.jit
def first_block(team, total, teams):
    """Where the range of `team` begins in the line of `total` blocks; that of `teams` is the line's end."""
    return team * total // teams


@triton.jit
def team_of(block, total, teams):
    """The team whose range holds `block`: the last one that begins at or before it."""
    return ((block + 1) * teams - 1) // total


@triton.jit
def piece_number(team, tile, tiles, begin):
    """Where a team keeps its piece of a cut matrix: it has at most one that begins within a matrix (`begin > 0`), its
    first, and one that begins with the matrix, its last."""
    return (team * tiles + tile) * 2 + (begin == 0)
