"""What inference joins beyond one layer's tail, and the one switch for it.

- *Chunks*: the chain runs over so few rows (images x pixels) at a time that what lies between two layers stays in L2. In
  captured CUDA graphs alone, since they multiply the launches, and those by themselves cost more than memory does.
- *Pairs*: two layers and their ToRGB in one kernel, so that what lies between them is never in memory (`pairs`).
- *Overlap*: a layer's kernel is launched while the one before it ends (programmatic dependent launch, compute capability 9.0
  and up), since chunks make the gaps between launches many.

Chunks and overlap change no bit of the result; pairs sum in another order, within the error of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..spec import StackSpec
from . import config


@dataclass(frozen=True)
class Fusion:
    """What is joined.

    Attributes:
        chunks: False: parts as large as memory allows; True: parts that stay in L2, by `rows_in_l2`, in captured graphs; a
            number: parts of that many rows, always.
        overlap: launch a layer's kernel early.
        pairs: two layers are one kernel where no width of theirs exceeds this; 0: none are.
        pair_tile: tile of the pairs, None for the rule `config.pair_tile`.
    """

    chunks: bool | int = False
    overlap: bool = False
    pairs: int = 0
    pair_tile: config.PairTile | None = None


# The switch. Nothing is on before it is measured to pay: benchmarks/triton_fusion_bench.py, csrc/NOTES.md.
DEFAULT = Fusion()

# Rows of a part that need not stay anywhere: what lies between two layers is then at most 1 GB at width 512 in bfloat16,
# whatever the image's size.
_MOST_ROWS = 1 << 20
# Share of L2 for what lies between layers; the rest is for weights, noise and the input that streams through.
_SHARE = 0.7

_current = DEFAULT
_seen: set[tuple] = set()  # calls that have run in chunks once, by what decides their kernels


@contextmanager
def using(fusion: Fusion) -> Iterator[None]:
    """`fusion` in place of the default within the block, in every thread: for measurements and tests."""
    global _current
    before, _current = _current, fusion
    try:
        yield
    finally:
        _current = before


def current() -> Fusion:
    """What is joined now."""
    return _current


def rows_in_l2(bytes_a_row: int, tile: config.Tile, tiles_across: int, processors: int, l2_bytes: int) -> int | None:
    """Rows of a chunk: as many full waves of `tile`s as fit into a share of L2, None where not even one does.

    A launch whose last wave is full wastes no multiprocessor, and more waves mean fewer launches for the same rows.

    Args:
        bytes_a_row: of every buffer between two layers, for one row.
        tile: of a layer's product.
        tiles_across: tiles that a row of the widest layer takes.
        processors: multiprocessors of the device.
        l2_bytes: size of its L2.
    """
    wave = processors * tile.rows // tiles_across // tile.rows * tile.rows
    waves = int(_SHARE * l2_bytes) // max(1, wave * bytes_a_row)
    return waves * wave or None


def part_rows(spec: StackSpec, batch: int, pixels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of one part of inference over the layers of `spec`, for `batch` images of `pixels`.

    By rule it is small while a graph is captured, and in the first call of a shape: what the capture launches has to be
    compiled and loaded by then, and a part's kernels differ from the whole's in what Triton knows of their sizes.
    """
    chunks = _current.chunks
    if chunks is not True:
        return _MOST_ROWS if chunks is False else chunks
    widest = max(spec.widths[1:], default=0)
    if not widest or device.type != "cuda":
        return _MOST_ROWS
    call = (_current, spec, batch, pixels, dtype, device)
    if call in _seen and not torch.cuda.is_current_stream_capturing():
        return _MOST_ROWS
    _seen.add(call)
    buffers = max(spec.output_buffers()) + 1
    tile = config.product_tile(widest, widest, dtype, device)
    tiles_across = -(-widest // tile.cols)
    processors, l2 = config.device_limits(device)[2], config.l2_bytes(device)
    return rows_in_l2(buffers * widest * dtype.itemsize, tile, tiles_across, processors, l2) or _MOST_ROWS
