"""Tile sizes by dtype, shape and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: `rows` x `cols` of the result, `inner` of the sum at a time."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> tuple[int, tuple[int, int], int]:
    """Shared memory a block may use (bytes), compute capability, multiprocessors. Interpreted kernels get a small chip."""
    if device.type != "cuda":
        return 100 * 1024, (8, 0), 8
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 100 * 1024)
    return shared, (properties.major, properties.minor), properties.multi_processor_count


def _fit(tile: Tile, rows: int, cols: int, inner: int, itemsize: int, shared: int) -> Tile:
    """`tile` shrunk to the channels (a product needs at least 16 in each direction) and to shared memory."""
    shape = [max(16, min(size, next_power_of_2(n))) for size, n in ((tile.rows, rows), (tile.cols, cols), (tile.inner, inner))]
    stages = tile.stages
    while stages > 2 and (shape[0] + shape[1]) * shape[2] * itemsize * stages > shared - 8 * 1024:
        stages -= 1
    warps = tile.warps if shape[0] * shape[1] >= 128 * 128 else 4
    return Tile(*shape, warps, stages)


@lru_cache(maxsize=1024)
def product_tile(cols: int, inner: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Tile of a layer's product over pixels (forward, dgrad): rows are pixels, cols channels.

    It does not depend on the number of pixels: a patch is computed as the full image is, to the last bit.
    """
    shared, capability, _ = device_limits(device)
    if dtype == torch.float32:
        tile = Tile(128, 128, 32, 8, 3)
    elif capability >= (9, 0):
        # 128 x 256 with eight warps keeps the accumulators in 128 registers; with four it spills
        tile = Tile(128, 256, 64, 8, 3)
    elif shared >= 160 * 1024:
        tile = Tile(128, 128, 64, 8, 3)
    else:
        tile = Tile(128, 128, 32, 8, 3)
    return _fit(tile, tile.rows, cols, inner, dtype.itemsize, shared)


@lru_cache(maxsize=1024)
def wgrad_tile(out_features: int, in_features: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Tile of the weight gradient: rows are output channels, cols input channels, the sum runs over pixels."""
    shared, capability, _ = device_limits(device)
    if dtype == torch.float32:
        tile = Tile(128, 128, 32, 8, 3)
    elif capability >= (9, 0):
        tile = Tile(128, 256, 64, 8, 4)
    else:
        tile = Tile(128, 128, 32, 8, 4)
    return _fit(tile, out_features, in_features, pixels, dtype.itemsize, shared)


def head_tile(pixels: int, width: int) -> Tile:
    """Tile of the chain's head, which only streams."""
    return Tile(max(16, min(64, next_power_of_2(pixels))), max(16, min(128, next_power_of_2(width))), 16, 8, 1)


def rgb_wgrad_tile(pixels: int, width: int) -> Tile:
    """Tile of a ToRGB's weight gradient, which only streams: rows of 16-byte loads, three sums in registers."""
    return Tile(max(1, min(32, next_power_of_2(pixels))), max(16, min(128, next_power_of_2(width))), 16, 4, 1)


@dataclass(frozen=True)
class StreamTile:
    """How `chain_rgb_wgrad` reads: `rows` rows of `cols` channels (256 a warp) at a time, and `programs` programs a
    multiprocessor in a wave."""

    rows: int
    cols: int
    stages: int
    programs: int

    @property
    def warps(self) -> int:
        return max(1, self.cols // 256)


def rgb_chain_tile() -> StreamTile:
    """Programs of one warp, whose 168 registers a thread let 12 reside: 48 KB on their way to a multiprocessor."""
    return StreamTile(8, 256, 1, 12)


@lru_cache(maxsize=1024)
def rgb_chain_splits(sums: int, pixels: int, tile: StreamTile, device: torch.device) -> int:
    """Parts into which the pixels of `sums` sums are cut: those whose waves are over first, each program's beginning and end
    counted as eight steps. A last wave of few programs has too little on its way to keep memory busy."""
    slots = tile.programs * device_limits(device)[2]
    most = max(1, min(pixels // (16 * tile.rows), 8 * slots // sums))
    return min(range(1, most + 1), key=lambda n: -(-sums * n // slots) * (-(-pixels // n) + 8 * tile.rows))


def wgrad_splits(tiles: int, pixels: int, inner: int, device: torch.device) -> int:
    """Parts into which the pixels are cut so that every multiprocessor has work: enough for about two waves, each of at
    least 1024 pixels, none where one wave is nearly full already."""
    _, _, processors = device_limits(device)
    if tiles * 10 >= processors * 9:
        return 1
    return max(1, min(2 * processors // tiles, pixels // max(1024, inner)))
