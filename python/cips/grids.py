"""Coordinate grids: float32 `[H, W, 2]`, channel 0 = x (along a row), channel 1 = y (down the rows), ends
inclusive.

Every coordinate comes from an integer position by one formula,

    t(i; n) = (2 i - (n - 1)) / (n - 1)        t(0) = -1, t(n - 1) = +1  (CIPS section 3: x' = 2 x / (W - 1) -
    1)

evaluated in float64 from integers and rounded once. It is a function of the rational number alone, so a point
has the same bits in a full grid, a patch, a tile or a denser grid, on any device. Counter-based noise is
keyed by those bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cips_kernels.encoding import coordinate

__all__ = ["as_size", "coordinate", "dense", "from_positions", "full", "patch", "tile"]

Device = torch.device | str | None


def from_positions(rows: Tensor, columns: Tensor, size: int | Sequence[int]) -> Tensor:
    """Grid `[len(rows), len(columns), 2]` of the given integer rows and columns of an image of `size`."""
    height, width = as_size(size)
    y, x = coordinate(rows, height), coordinate(columns, width)
    return torch.stack((x[None, :].expand(len(rows), -1), y[:, None].expand(-1, len(columns))), -1)


def full(height: int, width: int, device: Device = None) -> Tensor:
    """Every pixel of a `height` x `width` image: `[height, width, 2]`. A larger size than trained samples
    denser.
    """
    height, width = as_size((height, width))
    rows = torch.arange(height, device=device)
    return from_positions(rows, torch.arange(width, device=device), (height, width))


def dense(height: int, width: int, factor: int, device: Device = None) -> Tensor:
    """A grid `factor` times finer that still holds every pixel: `[factor (height-1) + 1, factor (width-1) +
    1, 2]`.

    Entry `[factor * r, factor * c]` has the bits of entry `[r, c]` of `full(height, width)`.
    """
    height, width = as_size((height, width))
    if factor < 1:
        raise ValueError(f"factor: expected an integer of at least 1, got {factor!r}")
    return full(factor * (height - 1) + 1, factor * (width - 1) + 1, device)


def patch(
    size: int | Sequence[int],
    k: int | Sequence[int],
    sigma: int = 1,
    offset: Sequence[int] = (0, 0),
    device: Device = None,
) -> Tensor:
    """A patch of an image: `k` rows and columns, `sigma` pixels apart (CIPS supplement, section 2).

    Args:
        size: (height, width) of the whole image, or one number for a square.
        k: (rows, columns) of the patch, or one number.
        sigma: step between its pixels; 1 is dense, more is dilated.
        offset: (top, left), the image's row and column of the patch's first pixel. The paper's condition is
            0 <= left < width - (K - 1) sigma, and the same for the rows.

    Returns:
        `[rows, columns, 2]`.

    Raises:
        ValueError: the patch does not lie inside the image.
    """
    size, k = as_size(size), as_size(k, "k")
    if sigma < 1:
        raise ValueError(f"sigma: expected an integer of at least 1, got {sigma!r}")
    for name, start, count, limit in zip(("top", "left"), offset, k, size):
        if start < 0 or start + (count - 1) * sigma >= limit:
            raise ValueError(
                f"offset: {name}={start} puts {count} pixels, {sigma} apart, outside an image of {limit}; "
                f"expected 0 <= {name} < {limit - (count - 1) * sigma}"
            )
    rows, columns = (start + sigma * torch.arange(count, device=device) for start, count in zip(offset, k))
    return from_positions(rows, columns, size)


def tile(
    size: int | Sequence[int], top: int, left: int, height: int, width: int, device: Device = None
) -> Tensor:
    """The `height` x `width` rectangle of an image of `size` whose first pixel is (`top`, `left`)."""
    return patch(size, (height, width), 1, (top, left), device)


def as_size(size: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        ValueError: not one or two integers of at least 1.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair):
        raise ValueError(f"{name}: expected one or two integers of at least 1, (height, width), got {size!r}")
    return pair
