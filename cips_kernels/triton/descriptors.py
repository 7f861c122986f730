"""Launches of the kernels that load by tensor descriptor, and when they may be used."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..spec import StackSpec
from .config import Tile, device_limits
from .order import evens

_SLICED = 256  # a tile this wide leaves in two slices, so that four stages of operands fit beside its staging


@lru_cache(maxsize=1)
def _host_descriptors() -> bool:
    """Triton 3.4 and newer make descriptors on the host and fuse the loop over tiles with the loop over channels."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)


def usable(*operands: Tensor) -> bool:
    """Whether the copy engine can read `operands` `[..., P, C]`: half precision, channels adjacent, rows on 16 bytes."""
    first = operands[0]
    if first.dtype.itemsize != 2 or device_limits(first.device)[1] < (9, 0) or not _host_descriptors():
        return False
    return all(
        t.stride(-1) == 1
        and all(stride % 8 == 0 for stride in t.stride()[:-1])
        and t.shape[-1] >= 32
        and t.data_ptr() % 16 == 0
        for t in operands
    )


def describe(t: Tensor, rows: int, cols: int):
    """A descriptor of `t` `[..., R, C]` for blocks of `rows` x `cols` of one image."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # the copy engine wants a batch stride even where one image is all there is
    strides = [1]
    for dim in range(t.dim() - 2, -1, -1):
        strides.insert(0, t.stride(dim) if t.shape[dim] > 1 or dim == t.dim() - 2 else t.shape[dim + 1] * strides[0])
    return TensorDescriptor(t, list(t.shape), strides, [1] * (t.dim() - 2) + [rows, cols])


def _programs(tiles: int, device: torch.device) -> int:
    return min(tiles, device_limits(device)[2])


def forward(
    x: Tensor, m: Tensor, bias: Tensor, strength: Tensor, noise: Tensor | None, out: Tensor | None, rgb_m: Tensor | None,
    rgb_part: Tensor | None, tile: Tile, spec: StackSpec, sums: Tensor | None,
) -> None:  # fmt: skip
    """As `layers.layer_forward`, for operands that are `usable`."""
    batch, out_features, in_features = m.shape
    pixels = x.shape[1]
    parts = 2 if tile.cols >= _SLICED else 1
    tiles = batch * triton.cdiv(pixels, tile.rows) * triton.cdiv(out_features, tile.cols)
    programs = _programs(tiles, x.device)
    x_desc = describe(x, tile.rows, tile.inner)
    from .descriptor_forward import modfc_fwd_descriptor_kernel

    r = m if rgb_m is None else rgb_m
    modfc_fwd_descriptor_kernel[(programs,)](
        x_desc, int(x.shape[0] > 1), describe(m, tile.cols, tile.inner),
        x_desc if out is None else describe(out, tile.rows, tile.cols // parts),
        x_desc if sums is None else describe(sums, tile.rows, tile.cols // parts),
        bias, strength, bias if noise is None else noise, 0 if noise is None else noise.stride(0),
        r, r.stride(0), r.stride(1), bias if rgb_part is None else rgb_part,
        batch, pixels, in_features, out_features, evens(spec, out_features), spec.negative_slope, spec.gain, programs,
        NOISE=noise is not None, CHANNELS=0 if rgb_m is None else rgb_m.shape[1], STORE=out is not None, SUMS=sums is not None,
        ACTIVATION=spec.activation,
        BLOCK_P=tile.rows, BLOCK_O=tile.cols, BLOCK_I=tile.inner, PARTS=parts,
        # with the sums in tensor memory (10.0) their way out takes the room of the fourth stage
        num_warps=tile.warps, num_stages=4 if device_limits(x.device)[1] < (10, 0) else 3,
    )  # fmt: skip


def dgrad(
    u: Tensor, m: Tensor, act: Tensor, drgb: Tensor | None, rgb_m: Tensor | None, out: Tensor,
    bias_part: Tensor | None, rows_part: Tensor | None, tile: Tile, spec: StackSpec, made: Tensor | None,
) -> None:  # fmt: skip
    """As `layers.layer_dgrad`, for operands that are `usable`; `drgb` contiguous."""
    batch, out_features, in_features = m.shape
    pixels = u.shape[1]
    tiles = batch * triton.cdiv(pixels, tile.rows) * triton.cdiv(in_features, tile.cols)
    programs = _programs(tiles, u.device)
    from .descriptor_dgrad import modfc_dgrad_descriptor_kernel

    r = m if rgb_m is None else rgb_m
    out_desc = describe(out, tile.rows, tile.cols // 2)
    modfc_dgrad_descriptor_kernel[(programs,)](
        describe(u, tile.rows, tile.inner), describe(m, tile.inner, tile.cols),
        describe(act, tile.rows, tile.cols // 2),
        out_desc, out_desc if made is None else describe(made, tile.rows, tile.cols // 2),
        u if drgb is None else drgb, r, r.stride(0), r.stride(1),
        u if bias_part is None else bias_part, u if rows_part is None else rows_part,
        batch, pixels, in_features, out_features, evens(spec, in_features), spec.negative_slope, spec.gain, programs,
        CHANNELS=0 if rgb_m is None else rgb_m.shape[1], PARTS=bias_part is not None, MADE=made is not None,
        ACTIVATION=spec.activation,
        BLOCK_P=tile.rows, BLOCK_I=tile.cols, BLOCK_O=tile.inner, FLATTEN=True,
        num_warps=tile.warps, num_stages=3,
    )  # fmt: skip


def wgrad(
    u: Tensor, x: Tensor, target: Tensor, tile: Tile, splits: int, per_split: int, fragment_u: bool, scale: float
) -> None:
    """As the launch in `layers.layer_wgrad`, for operands that are `usable`."""
    batch, pixels, out_features = u.shape
    tiles = batch * triton.cdiv(out_features, tile.rows) * triton.cdiv(x.shape[2], tile.cols)
    from .descriptor_wgrad import modfc_wgrad_descriptor_kernel

    modfc_wgrad_descriptor_kernel[(tiles * splits,)](
        describe(u, tile.inner, tile.rows), describe(x, tile.inner, tile.cols), int(x.shape[0] > 1),
        target, target.stride(0), target.stride(1), target.stride(2),
        pixels, x.shape[2], out_features, splits, per_split, scale, FRAGMENT_O=fragment_u,
        BLOCK_O=tile.rows, BLOCK_I=tile.cols, BLOCK_P=tile.inner, num_warps=tile.warps, num_stages=4,
    )  # fmt: skip
