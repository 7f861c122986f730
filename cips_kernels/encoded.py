"""The backward of colours from coordinates: encoding, stack and their gradients a tile of pixels at a time.

Neither the encoding (1,024 numbers a pixel) nor its gradient is ever there as a whole, and what a stack keeps is that of
one tile. Gradients are sums over tiles in a fixed order, in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .encoding import Encoding, cut_noise, fourier_features, points, table_lookup, table_rows, tiles
from .spec import StackInputs

_ROWS = 1 << 15  # points of a tile, images x points where every image has its own: the encoding and its gradient, 0.3 GB


def _points_of_a_tile(e: Encoding, batch: int) -> int:
    """Every tile costs something for each of its images. Hence of several images twice as many points, all those of 256 x
    256; of a large one by itself half as many again, since its stack is run a whole tile at a time."""
    if batch > 1:
        rows = 2 * _ROWS
    else:
        rows = _ROWS * 3 // 2 if e.pixels > 4 * _ROWS else _ROWS
    return max(1, rows // e.images)


class Wanted(NamedTuple):
    """Which gradients are asked for: of the encoding's tensors, and those of `spec.Needs` but for `x`."""

    fourier_weight: bool
    fourier_bias: bool
    table: bool
    coords: bool
    weights: bool
    biases: bool
    noise: bool


class _Tile:
    """The encoding of some pixels, made from leaves of its own."""

    def __init__(self, e: Encoding, wanted: Wanted, first: int, count: int) -> None:
        self.e, self.first, self.count = e, first, count
        table = e.table
        if table is not None:  # its gradient is that of these entries, of these rows alone
            self.rows = table_rows(e, first, count)
            table = table.flatten(0, 1).narrow(0, first, count) if e.on_table_grid else table.narrow(0, *self.rows)
        places = points(e, first, count)
        given = (e.fourier_weight, e.fourier_bias, table, places)
        with torch.enable_grad():
            self.leaves = [
                t if t is None else t.detach().requires_grad_(want) for t, want in zip(given, wanted[:4])
            ]
            weight, bias, table, self.places = self.leaves
            dtype = e.dtype or weight.dtype
            x = fourier_features(self.places, weight, bias).to(dtype)
            if table is not None:
                part = self.rows[0], e.table.shape[0]
                entries = table if e.on_table_grid else table_lookup(table, self.places, e.lookup, part)
                x = torch.cat((x, entries.to(dtype)), -1)
            self.x = x.unsqueeze(0) if x.dim() == 2 else x

    def add(self, totals: list[Tensor | None], grad_x: Tensor) -> None:
        """Add what `grad_x` gives the encoding's tensors."""
        numbers = [k for k, leaf in enumerate(self.leaves) if leaf is not None and leaf.requires_grad]
        for k, grad in zip(numbers, torch.autograd.grad(self.x, [self.leaves[k] for k in numbers], grad_x)):
            total = totals[k]
            if k == 2:
                grid = self.e.on_table_grid
                total = total.flatten(0, 1).narrow(0, self.first, self.count) if grid else total.narrow(0, *self.rows)
            elif k == 3:
                total = total.narrow(-2, self.first, self.count)
            total += grad


@torch.no_grad()
def backward(
    grad_rgb: Tensor, e: Encoding, inputs: StackInputs, spec_values: Sequence, wanted: Wanted, backend: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the encoding's four tensors, and of weights, styles, biases, noise strengths and given noise; None for
    what is not wanted.

    Args:
        grad_rgb: `[B, P, C]`.
        e: the encoding, whose size or points are those of the call.
        inputs: the call's other tensors; `x` and `coords` are not read.
        spec_values: the stack's constants, as the operators take them.
        backend: the one that served the forward.
    """
    given = (e.fourier_weight, e.fourier_bias, e.table, e.coords)
    found = [torch.zeros_like(t) if want else None for t, want in zip(given, wanted[:4])]
    flags = [any(wanted[:4]), wanted.weights, wanted.biases, wanted.noise]
    noise = inputs.noise if wanted.noise else None
    summed = (
        (inputs.weights, wanted.weights), (inputs.styles, wanted.weights), (inputs.biases, wanted.biases),
        (inputs.noise_strengths, wanted.noise), (noise, noise is not None),
    )  # fmt: skip
    totals = [torch.zeros_like(t, memory_format=torch.contiguous_format) if want else None for t, want in summed]
    for first, count in tiles(e.pixels, _points_of_a_tile(e, inputs.batch)):
        tile = _Tile(e, wanted, first, count)
        part = inputs._replace(
            x=tile.x.detach(), coords=tile.places.detach().float(), noise=cut_noise(inputs.noise, first, count)
        )
        kept = [part.x.new_empty(0) for _ in range(3)]  # nothing: the stack is run again, some images of the tile at a time
        grads = torch.ops.cips_kernels.modfc_stack_backward(
            None, grad_rgb.narrow(1, first, count), *part, *kept, *spec_values, "none", flags, backend
        )
        if flags[0]:
            tile.add(found, grads[0])
        for k, total in enumerate(totals):
            if total is not None:
                total = total.narrow(2, first, count) if k == 4 else total
                total += grads[1 + k]
        del tile, part, grads  # before the next one's are made
    return found, totals
