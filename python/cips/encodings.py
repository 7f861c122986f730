"""What the first layer reads at a point: Fourier features and a learned embedding (CIPS section 3).

Encodings are pixel-major, `[P, C]`, and the table is stored pixel-major too: on its own grid the embedding of
all pixels is the parameter itself, reshaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grids import as_size

LOOKUPS = ("exact", "compat")


class FourierFeatures(nn.Module):
    """`sin(B (x, y) + b)` with learned B `[C, 2]` and b `[C]`, in the dtype of its parameters.

    Drawn as the official code draws it: B from U(-sqrt(9/2), sqrt(9/2)), b from U(-1/sqrt(2), 1/sqrt(2)).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, 2).uniform_(-math.sqrt(4.5), math.sqrt(4.5)))
        self.bias = nn.Parameter(torch.empty(features).uniform_(-math.sqrt(0.5), math.sqrt(0.5)))

    def forward(self, coords: Tensor) -> Tensor:
        """`coords` `[..., 2]` -> `[..., C]`."""
        coords = coords.to(self.weight.dtype)
        # written out, not a matrix product: a pixel's bits must not depend on how many others there are
        angle = torch.addcmul(self.bias, coords[..., 0:1], self.weight[:, 0])
        return torch.sin(torch.addcmul(angle, coords[..., 1:2], self.weight[:, 1]))

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[0]}"


class CoordinateTable(nn.Module):
    """A learned vector for every pixel of a grid, interpolated bilinearly between them.

    The parameter `weight` is `[S_h, S_w, C]`, row 0 at y = -1, column 0 at x = -1. (The official code stores
    `[1, C, S_h, S_w]`.)

    Args:
        features: C.
        size: (S_h, S_w).
        init_std: it starts as N(0, init_std^2). Officially 1; Adam moves an entry by a learning rate a step,
            so that about init_std / lr steps pass before an image is smooth.
    """

    def __init__(self, features: int, size: int | Sequence[int], init_std: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*as_size(size), features) * init_std)

    @property
    def size(self) -> tuple[int, int]:
        """(S_h, S_w)."""
        return self.weight.shape[0], self.weight.shape[1]

    def own_grid(self) -> Tensor:
        """The embeddings of the table's own full grid, `[S_h S_w, C]`: a view, nothing is gathered."""
        return self.weight.flatten(0, 1)

    def forward(self, coords: Tensor, lookup: str = "exact") -> Tensor:
        """Embeddings of any points.

        Args:
            coords: `[..., 2]`, (x, y) in [-1, 1].
            lookup: "exact": -1 and +1 are the centres of the border entries (`grid_sample`'s
                align_corners=True); a point of the grid gets the table's entry, bit for bit. "compat": -1 and
                +1 are the outer edges (align_corners=False), as the official code in eval mode, which shifts
                an image's own grid by up to half a pixel.

        Returns:
            `[..., C]`. Written out as a gather and three interpolations, hence twice differentiable in every
            dtype.
        """
        if lookup not in LOOKUPS:
            raise ValueError(f"lookup: expected one of {', '.join(LOOKUPS)}, got {lookup!r}")
        rows, columns = self.size
        coords = coords.to(torch.promote_types(coords.dtype, torch.float32))
        left, right, x = _neighbours(coords[..., 0], columns, lookup)
        top, bottom, y = _neighbours(coords[..., 1], rows, lookup)
        table = self.own_grid()
        x, y = x.to(table.dtype).unsqueeze(-1), y.to(table.dtype).unsqueeze(-1)

        def entry(row: Tensor, column: Tensor) -> Tensor:
            return F.embedding(row * columns + column, table)

        upper = _interpolate(entry(top, left), entry(top, right), x)
        return _interpolate(upper, _interpolate(entry(bottom, left), entry(bottom, right), x), y)

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[2]}, size={self.size}"


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


class CoordinateEncoding(nn.Module):
    """Input of the first layer: Fourier features, then the coordinate embedding, `[..., C_f + C_t]`."""

    def __init__(
        self,
        fourier_features: int,
        table_features: int,
        table_size: int | Sequence[int],
        table_init_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.fourier = FourierFeatures(fourier_features)
        self.table = CoordinateTable(table_features, table_size, table_init_std)

    @property
    def features(self) -> int:
        """C_f + C_t."""
        return self.fourier.weight.shape[0] + self.table.weight.shape[2]

    def forward(
        self,
        coords: Tensor,
        *,
        own_grid: bool = False,
        lookup: str = "exact",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Encode points.

        Args:
            coords: `[P, 2]` or `[B, P, 2]`.
            own_grid: `coords` is the table's own full grid, flattened: with "exact" nothing is gathered.
            lookup: "exact" or "compat", see CoordinateTable.
            dtype: of the result; the arithmetic is done in the parameters' dtype and rounded once.

        Returns:
            `[1, P, C]` for `[P, 2]` (one encoding shared by all images), `[B, P, C]` for `[B, P, 2]`.
        """
        dtype = dtype or self.fourier.weight.dtype
        direct = own_grid and lookup == "exact"
        embedding = self.table.own_grid() if direct else self.table(coords, lookup)
        encoding = torch.cat((self.fourier(coords).to(dtype), embedding.to(dtype)), -1)
        return encoding.unsqueeze(0) if coords.dim() == 2 else encoding
