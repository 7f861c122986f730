"""From tensors to picture files."""

from __future__ import annotations

import math
import os
import zlib

import numpy as np
import torch
from torch import Tensor

from .checkpoint import atomic_file


def quantised(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` with values in [-1, 1] (clipped) -> uint8 `[B, H, W, 3]` on the same device."""
    scaled = (images.float() * 127.5 + 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


def to_uint8(images: Tensor) -> Tensor:
    """`quantised` on the CPU."""
    return quantised(images).cpu()


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images side by side, row by row.

    Args:
        images: uint8 `[B, H, W, 3]`, B at least 1.
        columns: images a row; None: as square as it goes.
        gap: white pixels between images.

    Returns:
        uint8 `[rows (H + gap) - gap, columns (W + gap) - gap, 3]`.
    """
    count, height, width, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = -(-count // columns)
    grid = torch.full((rows * (height + gap), columns * (width + gap), 3), 255, dtype=torch.uint8)
    for k, image in enumerate(images):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def save_png(
    path: str | os.PathLike[str], image: Tensor | np.ndarray, *, level: int = 6, synced: bool = True
) -> None:
    """Writes uint8 `[H, W, 3]` as PNG.

    Args:
        level: from 0 (stored) to 9 (smallest) as zlib's, which is 6 by default; but 1 looks for runs alone (`Z_RLE`), in
            half the time of zlib's 1 and, for filtered rows with grain, in fewer bytes.
        synced: as in `atomic_file`.

    Raises:
        UsageError: the file cannot be written.
    """
    from PIL import Image

    options = {"compress_type": zlib.Z_RLE} if level == 1 else {}
    with atomic_file(path, synced=synced) as file:
        Image.fromarray(np.asarray(image)).save(file, format="PNG", compress_level=level, **options)
