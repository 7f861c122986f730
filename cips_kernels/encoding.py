"""What the first layer reads at a point, made from its coordinates: Fourier features and a learned embedding.

    e(x, y) = [sin(B (x, y) + b), table(x, y)]          (CIPS section 3)

`Encoding` stands for that input without being it: 1,024 numbers a pixel that the on-chip kernel makes where it needs
them, and that the other backends make tile by tile, so that memory does not grow with the number of pixels. The formulas
here are the oracle of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import COMPUTE_DTYPES, describe, expect_device, expect_shape
from .spec import StackInputs, StackSpec

LOOKUPS = ("exact", "compat")
OWN = "own"
_TILE = {"cpu": 16384, "cuda": 65536}  # pixels: 64 MB of float32, 128 MB of bfloat16 at 1,024 channels


class Encoding(NamedTuple):
    """The input of a stack as a function of the coordinates: pass it to `FusedModFCStack` in place of a tensor.

    Attributes:
        fourier_weight: B, `[F, 2]`, float32 (or float64); F may be 0 where there is a table.
        fourier_bias: b, `[F]`.
        table: `[S_h, S_w, T]`, a vector for each point of a grid over [-1, 1] x [-1, 1], row 0 at y = -1; None: none.
        coords: points (x, y), `[P, 2]` for all images or `[B, P, 2]`; None: the full grid of `size`, row by row, of
            which no coordinate is stored. Outside [-1, 1] the table's border goes on, as in the official code; a NaN
            coordinate gives a NaN colour.
        size: (height, width) of the full grid.
        lookup: how the table is read. "exact": -1 and +1 are the centres of the border entries (`grid_sample`'s
            align_corners=True), and a point of the table's grid gets its entry, bit for bit. "compat": -1 and +1 are
            the outer edges (align_corners=False), as the official code in eval mode. "own": the table has an entry for each
            point, the same for all images, in the order of the points: nothing is looked up.
        dtype: of the encoding, and so of the stack; None: of `fourier_weight`.
    """

    fourier_weight: Tensor
    fourier_bias: Tensor
    table: Tensor | None = None
    coords: Tensor | None = None
    size: tuple[int, int] | None = None
    lookup: str = "exact"
    dtype: torch.dtype | None = None

    @property
    def pixels(self) -> int:
        """Points of each image, P."""
        if self.coords is not None:
            return self.coords.shape[-2]
        return self.size[0] * self.size[1] if self.size else 0

    @property
    def images(self) -> int:
        """B where each image has points of its own, otherwise 1."""
        return self.coords.shape[0] if self.coords is not None and self.coords.dim() == 3 else 1

    @property
    def features(self) -> int:
        """Channels F + T."""
        return self.fourier_weight.shape[0] + (0 if self.table is None else self.table.shape[2])

    @property
    def on_table_grid(self) -> bool:
        """Whether the points are the table's own, in its order: nothing to look up."""
        return self.lookup == OWN or self.coords is None and self.lookup == "exact" and self.table is not None and self.size == tuple(self.table.shape[:2])


def check_encoding(e: Encoding) -> None:
    """Raise ValueError or TypeError, naming the field, unless an encoding is well formed."""
    if e.lookup not in (*LOOKUPS, OWN):
        raise ValueError(f"lookup: expected one of {', '.join(LOOKUPS)}, {OWN}, got {e.lookup!r}")
    expect_shape("fourier_weight", e.fourier_weight, (None, 2), "[F, 2]")
    weight = e.fourier_weight
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"fourier_weight: expected float32 or float64, got {describe(weight)}")
    dtype = weight.dtype if e.dtype is None else e.dtype
    if dtype not in COMPUTE_DTYPES or (dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"dtype: expected float16, bfloat16 or float32, or float64 with float64 parameters, got {dtype}")
    expect_shape("fourier_bias", e.fourier_bias, (weight.shape[0],), "[F]")
    expect_device("fourier_bias", e.fourier_bias, weight, "fourier_weight")
    if e.table is not None:
        expect_shape("table", e.table, (None, None, None), "[S_h, S_w, T]")
        expect_device("table", e.table, weight, "fourier_weight")
        if e.table.dtype not in (weight.dtype, dtype):
            raise TypeError(f"table: expected {weight.dtype} or {dtype}, got {describe(e.table)}")
        if e.table.numel() == 0:
            raise ValueError(f"table: expected at least one entry of one channel, got {describe(e.table)}")
    elif not weight.shape[0]:
        raise ValueError(f"fourier_weight: expected at least one feature where there is no table, got {describe(weight)}")
    if (e.coords is None) == (e.size is None):
        raise ValueError(f"size: expected either coords or a size, got coords {describe(e.coords)} and size {e.size!r}")
    if e.coords is not None:
        if not isinstance(e.coords, Tensor) or not e.coords.is_floating_point():
            raise TypeError(f"coords: expected a floating-point tensor [P, 2] or [B, P, 2], got {describe(e.coords)}")
        shape = (None, 2) if e.coords.dim() == 2 else (None, None, 2)
        expect_shape("coords", e.coords, shape, "[P, 2] or [B, P, 2]")
        expect_device("coords", e.coords, weight, "fourier_weight")
    elif len(e.size) != 2 or not all(isinstance(n, int) and n >= 1 for n in e.size):
        raise ValueError(f"size: expected (height, width), each at least 1, got {e.size!r}")
    if e.lookup == OWN and e.table is not None and (e.images > 1 or e.table.shape[0] * e.table.shape[1] != e.pixels):
        raise ValueError(f"table: expected an entry for each of {e.images} x {e.pixels} points, got {describe(e.table)}")


def coordinate(position: Tensor, count: int) -> Tensor:
    """Coordinates of integer positions, `t(i; n) = (2 i - (n - 1)) / (n - 1)`, evaluated in float64 and rounded once to
    float32: a function of the rational number alone, so a point has the same bits on any grid that holds it.

    Args:
        position: integers i, any shape; outside 0..n-1 the line goes on beyond -1 and +1.
        count: number n of positions on the side; with a single one the coordinate is 0.
    """
    if count == 1:
        return torch.zeros_like(position, dtype=torch.float32)
    numerator = (2 * position - (count - 1)).double()
    # a tensor, not a number: CUDA divides by a host scalar through its reciprocal, which may round otherwise
    denominator = torch.full((), float(count - 1), dtype=torch.float64, device=position.device)
    return (numerator / denominator).float()


def points(e: Encoding, first: int = 0, count: int | None = None) -> Tensor:
    """Coordinates `[count, 2]` or `[B, count, 2]` of the pixels `first` and on; all by default."""
    count = e.pixels - first if count is None else count
    if e.coords is not None:
        return e.coords.narrow(-2, first, count)
    height, width = e.size
    index = torch.arange(first, first + count, device=e.fourier_weight.device)
    row = torch.div(index, width, rounding_mode="floor")
    return torch.stack((coordinate(index - row * width, width), coordinate(row, height)), -1)


def fourier_features(coords: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`sin(B (x, y) + b)`: coords `[..., 2]`, weight `[F, 2]`, bias `[F]` -> `[..., F]`, in the dtype of the weight."""
    coords = coords.to(weight.dtype)
    # written out, not a matrix product: a pixel's bits must not depend on how many others there are
    angle = torch.addcmul(bias, coords[..., 0:1], weight[:, 0])
    return torch.sin(torch.addcmul(angle, coords[..., 1:2], weight[:, 1]))


def table_rows(e: Encoding, first: int, count: int) -> tuple[int, int]:
    """(first row, number of rows) of the table within which `table_lookup` finds the pixels `first` and on: of a grid those
    around its lines, otherwise all."""
    rows = e.table.shape[0]
    if e.size is None or e.lookup != "exact" or rows == 1:
        return 0, rows
    height, width = e.size
    lines = (first // width, (first + count - 1) // width)
    above, below = (line * (rows - 1) / max(1, height - 1) if height > 1 else (rows - 1) / 2 for line in lines)
    begin = max(0, math.floor(above) - 1)  # a rounding may fall to either side
    return begin, min(rows, math.floor(below) + 3) - begin


def table_lookup(
    table: Tensor, coords: Tensor, lookup: str = "exact", part: tuple[int, int] | None = None
) -> Tensor:
    """Bilinear interpolation in a table `[S_h, S_w, T]` at `coords` `[..., 2]` -> `[..., T]`; see `Encoding`.

    Written out as a gather and three interpolations, hence twice differentiable in every dtype. `part`: (first, all) where
    `table` is but some rows from `first` on, with all that the coordinates need (`table_rows`), of a table of `all` rows.
    """
    rows, columns = table.shape[:2]
    above, rows = (0, rows) if part is None else part
    wide = torch.promote_types(table.dtype, torch.float32)
    coords = coords.to(torch.promote_types(coords.dtype, wide))  # positions are as exact as the entries
    left, right, x = _neighbours(coords[..., 0], columns, lookup)
    top, bottom, y = _neighbours(coords[..., 1], rows, lookup)
    entries = table.flatten(0, 1)
    x, y = x.to(wide).unsqueeze(-1), y.to(wide).unsqueeze(-1)

    def entry(row: Tensor, column: Tensor) -> Tensor:
        return F.embedding((row - above) * columns + column, entries).to(wide)

    # columns first: in an image larger than the table many pixels of a line have the same, and kernels keep them
    column = _interpolate(entry(top, left), entry(bottom, left), y)
    return _interpolate(column, _interpolate(entry(top, right), entry(bottom, right), y), x)


def _neighbours(t: Tensor, count: int, lookup: str) -> tuple[Tensor, Tensor, Tensor]:
    """The two table positions around a coordinate (int64) and the weight of the second, in [0, 1]."""
    if lookup == "exact":
        position = (t + 1) * ((count - 1) / 2)
        # A grid point's float32 coordinate lands up to count * 2**-23 off its integer: what float32 cannot
        # tell from a grid point is one. Adding the difference, not replacing the value, keeps the derivative.
        nearest = position.detach().round()
        off = nearest - position.detach()
        position = position + torch.where(off.abs() <= count * 2.0**-22, off, 0.0)
    else:
        position = ((t + 1) * count - 1) / 2
    position = position.clamp(0, count - 1)
    # a NaN coordinate reads entry 0 and stays NaN through its weight, instead of reading out of bounds
    first = position.detach().nan_to_num(0.0).floor().clamp(max=max(count - 2, 0))
    second = (first + 1).clamp(max=count - 1)
    return first.long(), second.long(), position - first


def _interpolate(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    # this form gives exactly a at weight 0 and exactly b at weight 1
    return (1 - weight) * a + weight * b


def embeddings(e: Encoding, first: int = 0, count: int | None = None) -> Tensor | None:
    """The table's part of the encoding, `[count, T]` or `[B, count, T]` in `e.dtype`; None without a table."""
    if e.table is None:
        return None
    count = e.pixels - first if count is None else count
    if e.on_table_grid:
        found = e.table.flatten(0, 1).narrow(0, first, count)
    else:
        found = table_lookup(e.table, points(e, first, count), e.lookup)
    return found.to(e.dtype or e.fourier_weight.dtype)


def encode(e: Encoding, first: int = 0, count: int | None = None) -> Tensor:
    """The encoding as a tensor, `[1, count, F + T]` or `[B, count, F + T]` in `e.dtype`; differentiable in the
    parameters and coordinates. The arithmetic is done in the parameters' dtype and rounded once."""
    dtype = e.dtype or e.fourier_weight.dtype
    features = fourier_features(points(e, first, count), e.fourier_weight, e.fourier_bias).to(dtype)
    table = embeddings(e, first, count)
    encoding = features if table is None else torch.cat((features, table), -1)
    return encoding.unsqueeze(0) if encoding.dim() == 2 else encoding


def tiles(pixels: int, tile: int) -> Iterator[tuple[int, int]]:
    """(first pixel, number of pixels) of each tile."""
    for first in range(0, pixels, tile):
        yield first, min(tile, pixels - first)


def cut_noise(noise: Tensor | None, first: int, count: int) -> Tensor | None:
    """Given noise `[L, B, P]` of a tile's pixels."""
    return None if noise is None else noise.narrow(2, first, count)


def by_tiles(
    e: Encoding,
    inputs: StackInputs,
    spec: StackSpec,
    rgb: Tensor,
    forward: Callable[[StackInputs, StackSpec, bool, bool], tuple],
) -> None:
    """The RGB sums of every pixel, into `rgb` `[B, P, C]`, by a backend's `forward`, a tile of pixels at a time."""
    tile = max(1, _TILE.get(rgb.device.type, 16384) // e.images)
    for first, count in tiles(e.pixels, tile):
        blend = None if inputs.blend is None else inputs.blend.narrow(-2, first, count)
        part = inputs._replace(
            x=encode(e, first, count),
            coords=points(e, first, count).float(),
            noise=cut_noise(inputs.noise, first, count),
            blend=blend,
        )
        rgb.narrow(1, first, count).copy_(forward(part, spec, False, False)[1])
