"""What the first layer reads at a point: Fourier features and a learned embedding (CIPS section 3).

Encodings are pixel-major, `[P, C]`, and the table is stored pixel-major too: on its own grid the embedding of
all pixels is the parameter itself, reshaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cips_kernels import Encoding
from cips_kernels.encoding import LOOKUPS, encode, fourier_features, table_lookup

from .grids import as_size


class FourierFeatures(nn.Module):
    """`sin(B (x, y) + b)` with learned B `[C, 2]` and b `[C]`, in the dtype of its parameters.

    Drawn as the official code draws it: B from U(-sqrt(9/2), sqrt(9/2)), b from U(-1/sqrt(2), 1/sqrt(2)).

    Args:
        features: C.
        bias: learn b, as the official code does; the paper's formula has none, and b is 0 then.
    """

    def __init__(self, features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, 2).uniform_(-math.sqrt(4.5), math.sqrt(4.5)))
        if bias:
            self.bias = nn.Parameter(torch.empty(features).uniform_(-math.sqrt(0.5), math.sqrt(0.5)))
        else:
            self.register_buffer("bias", torch.zeros(features), persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """`coords` `[..., 2]` -> `[..., C]`."""
        return fourier_features(coords, self.weight, self.bias)

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
        return table_lookup(self.weight, coords, lookup)

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[2]}, size={self.size}"


class CoordinateEncoding(nn.Module):
    """Input of the first layer: Fourier features, then the coordinate embedding, `[..., C_f + C_t]`.

    Args:
        fourier_features: C_f; 0: `fourier` is None.
        table_features: C_t; 0: `table` is None. One of the two is there.
        table_size, table_init_std: see `CoordinateTable`.
        fourier_bias: see `FourierFeatures`.
    """

    def __init__(
        self,
        fourier_features: int,
        table_features: int,
        table_size: int | Sequence[int],
        table_init_std: float = 1.0,
        fourier_bias: bool = True,
    ) -> None:
        super().__init__()
        if not fourier_features and not table_features:
            raise ValueError("fourier_features, table_features: expected at least one above 0, got 0 and 0")
        self.fourier = FourierFeatures(fourier_features, fourier_bias) if fourier_features else None
        self.table = CoordinateTable(table_features, table_size, table_init_std) if table_features else None

    @property
    def features(self) -> int:
        """C_f + C_t."""
        counts = (0 if part is None else part.weight.shape[axis] for part, axis in ((self.fourier, 0), (self.table, 2)))
        return sum(counts)

    def at(
        self,
        coords: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        lookup: str = "exact",
        dtype: torch.dtype | None = None,
    ) -> Encoding:
        """The encoding of points as `cips_kernels.Encoding`, which a stack takes in place of a tensor.

        Args:
            coords: `[P, 2]` or `[B, P, 2]`, or None: the full grid of `size`.
            size: (height, width).
            lookup: "exact" or "compat", see CoordinateTable.
            dtype: of the encoding; the arithmetic is done in the parameters' dtype and rounded once.
        """
        table = None if self.table is None else self.table.weight
        if self.fourier is None:
            weight, bias = table.new_empty((0, 2)), table.new_empty(0)
        else:
            weight, bias = self.fourier.weight, self.fourier.bias
        return Encoding(weight, bias, table, coords, size, lookup, dtype)

    def forward(
        self,
        coords: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        lookup: str = "exact",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The same as a tensor: `[1, P, C]` for `[P, 2]` or a grid (one encoding shared by all images), `[B, P, C]`
        for `[B, P, 2]`. On the table's own grid nothing is gathered.
        """
        return encode(self.at(coords, size=size, lookup=lookup, dtype=dtype))
