"""Launcher of the weight gradients on Hopper (csrc/kernels/stack_wgrad.cuh): every layer and image of a part in one launch,
and with them those of the ToRGBs that read what a layer reads.

`N = scale u^T x`, a sum over pixels. Both operands are read as the on-chip stack leaves them, channels in fragment order
(triton/fragment.py); matrices are in natural order. Deterministic.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import _DTYPES, _load
from .cuda_onchip import _stream
from .packing import Packing
from .spec import StackSpec
from .wgrad_plan import Matrix, deal

COLOUR_COLUMNS = 8  # of the colours' gradients as an operand, csrc/tile/stack_train.h

_ITEM, _SUM = struct.Struct("<12iqq"), struct.Struct("<6iq")


class Run(NamedTuple):
    """Layers `first .. last`, equally wide in and out: gradients at their sums and what they read."""

    first: int
    last: int
    u: Tensor  # [layers, n, P, O], contiguous
    x: Tensor  # [layers, n or 1, P, I]
    scale: float


def usable(x: Tensor) -> bool:
    """Whether the copy engine can read `x` `[..., P, C]`: channels adjacent, rows on 16 bytes."""
    aligned = all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and aligned and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0


@cache
def _clusters(dtype: torch.dtype, device: int) -> int:
    return _load().wgrad_clusters(_DTYPES[dtype], device)


class _Tables(NamedTuple):
    items: Tensor
    first_items: Tensor
    sums: Tensor
    pieces: int
    colour_parts: int


@cache  # never dropped: a captured CUDA graph may still read them
def _tables(
    packing: Packing, rgb_after: tuple[int, ...], layers: tuple[tuple[int, int, int, int], ...], image: int, images: int,
    blocks: int, clusters: int, device: torch.device,
) -> _Tables:  # fmt: skip
    """layers: (first, last, planes of x from layer to layer, whether images have planes of their own) of each run."""
    matrices = []
    for run, (first, last, planes, own) in enumerate(layers):
        for layer in range(first, last + 1):
            m = packing.layers[layer]
            readers = [rgb for after, rgb in zip(rgb_after, packing.rgbs) if after == layer - 1]
            for b in range(images):
                number = image + b
                colours = tuple(
                    (r.mod_offset + number * r.out_features * r.row_stride, r.row_stride) for r in readers
                )
                place = m.mod_offset + number * m.out_features * m.row_stride
                u_plane, x_plane = (layer - first) * images + b, (layer - first) * planes + b * own
                matrices.append(
                    Matrix(run, u_plane, x_plane, b, m.out_features, m.in_features, place, colours)
                )
    plan = deal(matrices, blocks, clusters, _load().WGRAD_TILE, _load().WGRAD_STEPS)
    items = b"".join(_ITEM.pack(*item, 0) for own in plan.clusters for item in own)
    starts = [0]
    for own in plan.clusters:
        starts.append(starts[-1] + len(own))
    sums = b"".join(_SUM.pack(*entry) for entry in plan.sums)

    def on_device(raw: bytes) -> Tensor:
        return torch.frombuffer(bytearray(raw or bytes(8)), dtype=torch.uint8).to(device)

    first_items = torch.tensor(starts, dtype=torch.int32).to(device)
    return _Tables(
        on_device(items), first_items, on_device(sums), plan.pieces, plan.colour_parts
    )


def wgrad(
    runs: Sequence[Run], packing: Packing, spec: StackSpec, n: Tensor, colours: Tensor, colour_scale: float, image: int
) -> None:
    """Write the matrices of the layers of `runs`, and of the ToRGBs in front of them, for some images.

    Args:
        runs: of the same images and pixels; `usable`.
        packing: where the matrices lie in `n`.
        n: float32, flat.
        colours: `[images, cuda_saved.padded(P), 8]`, the operand that `chain_backward` leaves.
        colour_scale: factor of the ToRGBs' sums.
        image: the first image's number among those of `packing`.
    """
    module, device, dtype = _load(), n.device, colours.dtype
    images, pixels = runs[0].u.shape[1:3]
    blocks = -(-pixels // module.WGRAD_PIXELS)
    clusters = _clusters(dtype, device.index)
    for start in range(0, len(runs), module.WGRAD_RUNS):
        some = runs[start : start + module.WGRAD_RUNS]
        shapes = tuple((r.first, r.last, _planes(r.x), int(r.x.shape[1] > 1)) for r in some)
        tables = _tables(packing, spec.rgb_after, shapes, image, images, blocks, clusters, device)
        tile = module.WGRAD_TILE
        pieces = torch.empty(tables.pieces * tile * tile, dtype=torch.float32, device=device)
        parts = torch.empty(tables.colour_parts * COLOUR_COLUMNS * tile, dtype=torch.float32, device=device)
        module.stack_wgrad(
            runs=[_tuple(r, packing) for r in some],
            items=tables.items.data_ptr(),
            first_items=tables.first_items.data_ptr(),
            clusters=tables.first_items.numel() - 1,
            sums=tables.sums.data_ptr(),
            sum_count=tables.sums.numel() // _SUM.size,
            n=n.data_ptr(),
            pieces=pieces.data_ptr(),
            colour_parts=parts.data_ptr(),
            colours=colours.data_ptr(),
            padded_pixels=colours.shape[1],
            channels=spec.rgb_channels,
            colour_scale=colour_scale,
            pixels=pixels,
            dtype=_DTYPES[dtype],
            device=device.index,
            stream=_stream(device),
        )


def _planes(x: Tensor) -> int:
    """Planes of `x` `[layers, n, P, I]` from a layer to the next, those of other images included."""
    return x.stride(0) // x.stride(1) if x.shape[0] > 1 else x.shape[1]


def _tuple(run: Run, packing: Packing) -> tuple:
    u, x, matrix = run.u, run.x, packing.layers[run.first]
    depth, images = x.shape[:2]
    planes = (depth - 1) * _planes(x) + images
    plane = x.stride(1) if planes > 1 else x.shape[2] * x.stride(2)
    return (
        u.data_ptr(), u.shape[0] * u.shape[1], u.shape[3],
        x.data_ptr(), planes, 2 * plane, 2 * x.stride(2), x.shape[3],
        matrix.row_stride, run.first > 0, run.scale,
    )  # fmt: skip
