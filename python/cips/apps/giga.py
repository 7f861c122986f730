"""Images of any size, written tile by tile: memory holds one tile, whatever the size."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..checkpoint import atomic_file
from ..errors import UsageError
from ..generator import Generator
from ..pictures import to_uint8
from .draw import Noise, styles

_CLASSIC_LIMIT = 2**31  # bytes of pixels from which on the file is a BigTIFF


@torch.no_grad()
def giga(
    path: str | os.PathLike[str],
    generator: Generator,
    z: Tensor,
    size: int | tuple[int, int],
    *,
    tile: int = 512,
    truncation: float = 1.0,
    noise: Noise = 0,
) -> None:
    """Writes one image as a tiled TIFF, compressed without loss, pixel for pixel that of `generator(z, size=size)`.

    Args:
        path: the file; it appears when the last tile is written.
        z: the latent `[style_dim]`.
        size: (height, width), or one number.
        tile: pixels a side of a tile, a multiple of 16.
        truncation, noise: as in `Generator.forward`.

    Raises:
        ValueError: naming the argument.
        UsageError: the file cannot be written, or tifffile is not installed. Nothing is left then.
    """
    try:
        import tifffile
    except ImportError as error:
        raise UsageError("writing a TIFF needs tifffile; install the extra: pip install -e '.[apps]'") from error

    height, width = grids.as_size(size)
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < 16 or tile % 16:
        raise ValueError(f"tile: expected a positive multiple of 16, got {tile!r}")
    w = styles(generator, z[None], truncation)
    big = height * width * 3 >= _CLASSIC_LIMIT
    with atomic_file(path) as file, tifffile.TiffWriter(file, bigtiff=big) as tiff:
        tiff.write(
            _tiles(generator, w, height, width, tile, noise),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(tile, tile),
            photometric="rgb",
            compression="zlib",
            metadata=None,
            maxworkers=1,  # more of them would draw tiles ahead and keep them
        )


def _tiles(generator: Generator, w: Tensor, height: int, width: int, tile: int, noise: Noise) -> Iterator[np.ndarray]:
    from tqdm import tqdm

    corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
    for top, left in tqdm(corners, desc="drawing", unit="tile", delay=2, leave=False):
        rows, columns = min(tile, height - top), min(tile, width - left)
        coords = grids.tile((height, width), top, left, rows, columns, w.device)
        pixels = to_uint8(generator(w, coords, input_is_w=True, noise=noise))[0].numpy()
        # a TIFF's tiles are all of one size; what sticks out is cut off by the reader
        yield np.pad(pixels, ((0, tile - rows), (0, tile - columns), (0, 0)))
