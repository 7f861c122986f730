"""Launches of the layer kernels: tensors in, tensors out, one function a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..spec import StackInputs, StackSpec
from . import descriptors
from .chain_rgb_wgrad import rgb_wgrad_chain_kernel
from .chain_rgb_wgrad_sum import rgb_wgrad_chain_sum_kernel
from .config import (
    StreamTile,
    Tile,
    device_limits,
    head_tile,
    next_power_of_2,
    product_tile,
    rgb_chain_splits,
    rgb_chain_tile,
    rgb_wgrad_tile,
    wgrad_splits,
    wgrad_tile,
)
from .dgrad import modfc_dgrad_kernel, modfc_head_kernel
from .forward import modfc_fwd_kernel
from .fragment import check_fragment
from .input_grad import modfc_dgrad_input_kernel
from .noise import counter_noise_kernel, counter_strength_kernel
from .order import evens
from .rgb import rgb_fwd_kernel, rgb_sum_kernel
from .rgb_wgrad import rgb_wgrad_kernel
from .strength import noise_bwd_kernel
from .wgrad import modfc_wgrad_kernel

_NOISE_PIXELS = 1024
_FEW_CHANNELS = 4  # up to here a ToRGB is added up element by element, beyond it by the matrix units


@dataclass(frozen=True)
class Arithmetic:
    """How products are computed: TF32 or IEEE for float32, and whether operands are widened first."""

    precision: str
    upcast: bool

    @staticmethod
    def of(x: Tensor) -> Arithmetic:
        """For float32, PyTorch's own switch decides. The interpreter's bfloat16 products are wrong, so it widens them."""
        tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return Arithmetic("tf32" if tf32 else "ieee", x.dtype != torch.float32 and not x.is_cuda)


def noise_values(inputs: StackInputs, spec: StackSpec, first_pixel: int, first_image: int = 0) -> Tensor | None:
    """The noise of every layer, `[L, B, P]` float32 with adjacent pixels, or None where it is off."""
    given, seed, coords = inputs.noise, inputs.seed, inputs.coords
    if given is not None:
        return given if given.stride(2) == 1 else given.contiguous()
    if seed is None or not spec.depth:
        return None
    batch, pixels = inputs.batch, inputs.pixels
    out = torch.empty((spec.depth, batch, pixels), dtype=torch.float32, device=inputs.x.device)
    block = max(16, min(_NOISE_PIXELS, next_power_of_2(pixels)))
    points = out if coords is None else coords.contiguous()
    counter_noise_kernel[(batch * triton.cdiv(pixels, block), spec.depth)](
        out, seed, points, points.stride(0) if coords is not None and coords.dim() == 3 else 0,
        batch, pixels, first_pixel, spec.first_layer, first_image, COORDS=coords is not None, BLOCK_P=block, num_warps=4,
    )  # fmt: skip
    return out


def strength_grads(rows: Tensor, inputs: StackInputs, spec: StackSpec) -> Tensor:
    """Gradients `[L]` of the noise strengths, from the sums over channels of u, `[L, B, P]` float32, contiguous. Deterministic."""
    if inputs.noise is not None or inputs.seed is None:
        return (noise_values(inputs, spec, 0) * rows).sum((1, 2))
    _, batch, pixels = rows.shape
    block = max(16, min(_NOISE_PIXELS, next_power_of_2(pixels)))
    programs, coords = batch * triton.cdiv(pixels, block), inputs.coords
    parts = torch.empty((spec.depth, programs), dtype=torch.float32, device=rows.device)
    points = rows if coords is None else coords.contiguous()
    counter_strength_kernel[(programs, spec.depth)](
        parts, rows, inputs.seed, points, points.stride(0) if coords is not None and coords.dim() == 3 else 0, batch, pixels,
        spec.first_layer, COORDS=coords is not None, BLOCK_P=block, num_warps=4,
    )  # fmt: skip
    return parts.sum(1)


def _fast_sine(x: Tensor) -> bool:
    """Whether the hardware's sine serves: for results of 16 bits, compiled for an NVIDIA GPU."""
    return x.dtype.itemsize == 2 and not Arithmetic.of(x).upcast and torch.version.hip is None


def _batch_stride(t: Tensor, batch: int) -> int:
    return t.stride(0) if t.shape[0] == batch and batch > 1 else 0


def _channels_block(channels: int) -> int:
    return max(16, next_power_of_2(channels))


def layer_forward(
    x: Tensor,
    m: Tensor,
    bias: Tensor,
    strength: Tensor,
    noise: Tensor | None,
    out: Tensor | None,
    rgb_m: Tensor | None,
    rgb_part: Tensor | None,
    spec: StackSpec,
    sums: Tensor | None = None,
) -> None:
    """One layer into `out` (None: not kept), its ToRGB's shares into `rgb_part` `[T, B, P, C]` (None: none reads it), what
    its activation read into `sums` `[B, P, O]` (contiguous; None: not kept)."""
    batch, out_features, in_features = m.shape
    pixels = x.shape[1]
    arithmetic = Arithmetic.of(x)
    tile = product_tile(out_features, in_features, x.dtype, x.device)
    channels = 1 if rgb_m is None else rgb_m.shape[1]
    operands = [t for t in (x, m, out, sums) if t is not None]
    if channels <= _FEW_CHANNELS and descriptors.usable(*operands):
        descriptors.forward(x, m, bias, strength, noise, out, rgb_m, rgb_part, tile, spec, sums)
        return
    target = x if out is None else out
    r = m if rgb_m is None else rgb_m
    grid = (batch * triton.cdiv(pixels, tile.rows) * triton.cdiv(out_features, tile.cols),)
    modfc_fwd_kernel[grid](
        x, _batch_stride(x, batch), x.stride(1), x.stride(2),
        m, m.stride(0), m.stride(1),
        bias, strength, bias if noise is None else noise, 0 if noise is None else noise.stride(0),
        target, target.stride(0), target.stride(1), target.stride(2), x if sums is None else sums,
        r, r.stride(0), r.stride(1), bias if rgb_part is None else rgb_part,
        batch, pixels, in_features, out_features, channels, evens(spec, out_features), spec.negative_slope, spec.gain,
        NOISE=noise is not None, RGB=rgb_m is not None, STORE=out is not None, SUMS=sums is not None,
        ACTIVATION=spec.activation, FAST=_fast_sine(x),
        X_WIDE=x.stride(2) != 1, OUT_WIDE=target.stride(2) != 1, EVEN_K=in_features % tile.inner == 0,
        PRECISION=arithmetic.precision, UPCAST=arithmetic.upcast,
        BLOCK_P=tile.rows, BLOCK_O=tile.cols, BLOCK_I=tile.inner, BLOCK_C=_channels_block(channels),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def rgb_forward(x: Tensor, m: Tensor, rgb_part: Tensor) -> None:
    """A ToRGB of the stack's input as the share `rgb_part` `[B, P, C]`."""
    batch, channels, in_features = m.shape
    pixels = x.shape[1]
    arithmetic = Arithmetic.of(x)
    block_p = max(16, min(128, next_power_of_2(pixels)))
    rgb_fwd_kernel[(batch * triton.cdiv(pixels, block_p),)](
        x, _batch_stride(x, batch), x.stride(1), x.stride(2), m, m.stride(0), m.stride(1), rgb_part,
        pixels, in_features, channels,
        PRECISION=arithmetic.precision, UPCAST=arithmetic.upcast,
        BLOCK_P=block_p, BLOCK_I=64, BLOCK_C=_channels_block(channels), num_warps=4,
    )  # fmt: skip


def rgb_sum(part: Tensor, biases: Tensor, count: int, skip: Tensor | None, out: Tensor) -> None:
    """`skip`, the shares `part` `[T, B, P, C]` and `count` biases (flat, C each) into `out` `[B, P, C]`."""
    shares, batch, pixels, channels = part.shape
    source = out if skip is None else skip
    rgb_sum_kernel[(batch * triton.cdiv(pixels, 256),)](
        part, biases, source, source.stride(0), source.stride(1), source.stride(2),
        out, out.stride(0), out.stride(1), out.stride(2), batch, pixels, channels, shares, count,
        SKIP=skip is not None, BLOCK_P=256, BLOCK_C=next_power_of_2(channels), num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Partial sums of one layer's `u`, one for each tile: for its bias `[tiles, I]`, for its noise `[shares, B, P]`."""

    bias: Tensor
    rows: Tensor

    @staticmethod
    def empty(act: Tensor, tile: Tile) -> Parts:
        """Uninitialised, for a layer with output `act` `[B, P, I]` that a kernel with `tile` walks over."""
        batch, pixels, width = act.shape
        tiles, shares = batch * triton.cdiv(pixels, tile.rows), triton.cdiv(width, tile.cols)
        options = {"dtype": torch.float32, "device": act.device}
        return Parts(torch.empty((tiles, width), **options), torch.empty((shares, batch, pixels), **options))


def _rgb_arguments(drgb: Tensor | None, rgb_m: Tensor | None, fallback: Tensor) -> tuple:
    if drgb is None or rgb_m is None:
        return fallback, 0, 0, 0, fallback, 0, 0
    return drgb, drgb.stride(0), drgb.stride(1), drgb.stride(2), rgb_m, rgb_m.stride(0), rgb_m.stride(1)


def layer_dgrad(
    u: Tensor, m: Tensor, act: Tensor, drgb: Tensor | None, rgb_m: Tensor | None, wanted: bool, spec: StackSpec,
    made: Tensor | None = None,
) -> tuple[Tensor, Parts | None]:  # fmt: skip
    """`u` `[B, P, O]` of a layer to that of the layer below, `[B, P, I]`, and its parts where `wanted`.

    `act` `[B, P, I]` is the lower layer's output, or its sums where the activation is a sine; then its output goes to `made`,
    if given.
    """
    batch, out_features, in_features = m.shape
    pixels = u.shape[1]
    arithmetic = Arithmetic.of(u)
    tile = product_tile(in_features, out_features, u.dtype, u.device)
    out = torch.empty_like(act)
    parts = Parts.empty(act, tile) if wanted else None
    sums = (u, u) if parts is None else (parts.bias, parts.rows)
    channels = 0 if rgb_m is None else rgb_m.shape[1]
    if channels <= _FEW_CHANNELS and tile.cols >= 32 and descriptors.usable(u, m, act, out):
        descriptors.dgrad(u, m, act, drgb, rgb_m, out, *(parts and sums or (None, None)), tile, spec, made)
        return out, parts
    grid = (batch * triton.cdiv(pixels, tile.rows) * triton.cdiv(in_features, tile.cols),)
    modfc_dgrad_kernel[grid](
        u, m, m.stride(0), m.stride(1), act, *_rgb_arguments(drgb, rgb_m, u), out,
        out if made is None else made, *sums,
        batch, pixels, in_features, out_features, evens(spec, in_features), spec.negative_slope, spec.gain,
        CHANNELS=channels, PARTS=wanted, MADE=made is not None,
        ACTIVATION=spec.activation, FAST=_fast_sine(u), EVEN_K=out_features % tile.inner == 0,
        PRECISION=arithmetic.precision, UPCAST=arithmetic.upcast,
        BLOCK_P=tile.rows, BLOCK_I=tile.cols, BLOCK_O=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, parts


def head(
    grad: Tensor | None, act: Tensor, drgb: Tensor | None, rgb_m: Tensor | None, wanted: bool, spec: StackSpec
) -> tuple[Tensor, Parts | None]:
    """`u` of the last layer, from the gradients of its features `act` and of the RGB sum; and its parts where `wanted`.
    Where the activation is a sine `act` has the layer's sums."""
    batch, pixels, width = act.shape
    tile = head_tile(pixels, width)
    out = torch.empty((batch, pixels, width), dtype=act.dtype, device=act.device)
    parts = Parts.empty(act, tile) if wanted else None
    sums = (act, act) if parts is None else (parts.bias, parts.rows)
    source = act if grad is None else grad
    grid = (batch * triton.cdiv(pixels, tile.rows) * triton.cdiv(width, tile.cols),)
    modfc_head_kernel[grid](
        source, source.stride(0), source.stride(1), source.stride(2), act, act.stride(0), act.stride(1), act.stride(2),
        *_rgb_arguments(drgb, rgb_m, act), out, *sums, batch, pixels, width,
        evens(spec, width), spec.negative_slope, spec.gain,
        GRAD=grad is not None, CHANNELS=0 if rgb_m is None else rgb_m.shape[1], PARTS=wanted,
        ACTIVATION=spec.activation, FAST=_fast_sine(act), BLOCK_P=tile.rows, BLOCK_I=tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    return out, parts


def input_dgrad(
    u: Tensor | None, m: Tensor | None, drgb: Tensor | None, rgb_m: Tensor | None, out: Tensor, batch: int, add: bool = False
) -> None:
    """Gradient of the stack's input into `out` `[B or 1, P, I]`, or added to it; one image of output sums over all. `out` may be
    of a wider dtype than the matrices."""
    images, pixels, in_features = out.shape
    out_features = 16 if m is None else m.shape[1]
    some = rgb_m if m is None else m
    arithmetic = Arithmetic.of(some)
    tile = product_tile(in_features, out_features, some.dtype, out.device)
    grid = (images * triton.cdiv(pixels, tile.rows) * triton.cdiv(in_features, tile.cols),)
    modfc_dgrad_input_kernel[grid](
        out if u is None else u, some, some.stride(0), some.stride(1), *_rgb_arguments(drgb, rgb_m, out),
        out, out.stride(0), out.stride(1), out.stride(2),
        pixels, in_features, out_features, batch // images,
        DEPTH=m is not None, CHANNELS=0 if rgb_m is None else rgb_m.shape[1], ADD=add, EVEN_K=out_features % tile.inner == 0,
        PRECISION=arithmetic.precision, UPCAST=arithmetic.upcast,
        BLOCK_P=tile.rows, BLOCK_I=tile.cols, BLOCK_O=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def layer_wgrad(
    u: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    fragment_u: bool = False,
    scale: float = 1.0,
) -> None:
    """`N = scale u^T x` of each image into `out` `[B, O, I]` float32 (any strides); `x` may be shared (batch 1).

    `fragment_u`: the channels of `u` lie in fragment order (`fragment`); ValueError where they are no multiple of 32. `out`
    is in natural order. Where pixels are split every part is scaled, in float32.
    """
    batch, pixels, out_features = u.shape
    in_features = x.shape[2]
    if fragment_u:
        check_fragment(out_features, "u")
    arithmetic = Arithmetic.of(x)
    tile = wgrad_tile(out_features, in_features, pixels, x.dtype, x.device)
    tiles = batch * triton.cdiv(out_features, tile.rows) * triton.cdiv(in_features, tile.cols)
    splits = wgrad_splits(tiles, pixels, tile.inner, x.device)
    per_split = triton.cdiv(triton.cdiv(pixels, splits), tile.inner) * tile.inner
    splits = triton.cdiv(pixels, per_split)
    target = out[None]
    if splits > 1:
        target = torch.empty((splits, batch, out_features, in_features), dtype=torch.float32, device=x.device)
    if descriptors.usable(u, x):
        descriptors.wgrad(u, x, target, tile, splits, per_split, fragment_u, scale)
        return _add_splits(target, out)
    even = pixels % tile.inner == 0 and out_features % tile.rows == 0 and in_features % tile.cols == 0
    modfc_wgrad_kernel[(tiles * splits,)](
        u, _batch_stride(u, batch), u.stride(1), u.stride(2), x, _batch_stride(x, batch), x.stride(1), x.stride(2),
        target, target.stride(0), target.stride(1), target.stride(2),
        pixels, in_features, out_features, splits, per_split, scale,
        PRECISION=arithmetic.precision, UPCAST=arithmetic.upcast, EVEN=even, FRAGMENT_O=fragment_u,
        BLOCK_O=tile.rows, BLOCK_I=tile.cols, BLOCK_P=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _add_splits(target, out)


def _add_splits(target: Tensor, out: Tensor) -> None:
    """Sum the splits of a weight gradient, in order, where there are several."""
    if target.shape[0] > 1:
        torch.sum(target, 0, out=out)


def rgb_wgrad(drgb: Tensor, x: Tensor) -> Tensor:
    """`N = drgb^T x'` of each image, `[B, C, I]` float32; `x` may be shared (batch 1)."""
    batch, pixels, channels = drgb.shape
    in_features = x.shape[2]
    out = torch.empty((batch, channels, in_features), dtype=torch.float32, device=x.device)
    if channels > _FEW_CHANNELS:
        layer_wgrad(drgb.to(x.dtype), x, out)
        return out
    tile = rgb_wgrad_tile(pixels, in_features)
    tiles_i = triton.cdiv(in_features, tile.cols)
    splits = max(1, min(triton.cdiv(16 * device_limits(x.device)[2], batch * tiles_i), pixels // (8 * tile.rows)))
    per_split = triton.cdiv(triton.cdiv(pixels, splits), tile.rows) * tile.rows
    splits = triton.cdiv(pixels, per_split)
    part = torch.empty((batch, splits, channels, in_features), dtype=torch.float32, device=x.device)
    rgb_wgrad_kernel[(batch * splits * tiles_i,)](
        drgb, drgb.stride(0), drgb.stride(1), drgb.stride(2), x, _batch_stride(x, batch), x.stride(1), x.stride(2), part,
        pixels, in_features, splits, per_split,
        CHANNELS=channels, BLOCK_P=tile.rows, BLOCK_I=tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    return torch.sum(part, 1, out=out)


def rgb_wgrad_chain(
    drgb: Tensor, x: Tensor, table: Tensor, widest: int, out: Tensor, scale: float = 1.0, tile: StreamTile | None = None
) -> None:
    """`N = scale drgb^T x'` of every ToRGB of a stack and every image: one launch that reads, one that adds up.

    Deterministic: partial sums over pixels are added in a fixed order. They take `K B splits C widest` floats, 6 MB for the
    paper's stack on an H100.

    Args:
        drgb: contiguous `[B, P, C]`, C at most 3.
        x: flat, contiguous: the outputs `[B, P, W]` of layers one after the other, channels in fragment order (`fragment`).
        table: int64 `[K, 4]` on the device, a row a ToRGB: channels of `x` before those of the layer that it reads (summed
            over layers), its width W (a multiple of 32), where in `out` its first image's matrix `[C, W]` begins, and the
            elements from a row of it to the next; an image's matrix follows that of the image before. Not checked: that
            would be a synchronisation.
        widest: the largest W.
        out: float32, contiguous: receives the matrices, channels in natural order.
        scale: factor of the sums, in float32.
        tile: how to read, None for the usual way.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, more than 3 channels, or a width that is no multiple of 32.
    """
    batch, pixels, channels = drgb.shape
    if not 1 <= channels <= 3:
        raise ValueError(f"drgb has {channels} channels, expected 1 to 3")
    if not drgb.is_contiguous():
        raise ValueError(f"drgb has strides {drgb.stride()}, expected a contiguous tensor")
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 4 or not table.is_contiguous():
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)}, expected contiguous int64 [K, 4]")
    if x.dim() != 1 or not x.is_contiguous() or x.numel() < batch * pixels * widest:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least {batch * pixels * widest} elements, flat, contiguous")
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {out.stride()}, expected contiguous float32")
    check_fragment(widest, "x")
    tile = rgb_chain_tile() if tile is None else tile
    matrices, tiles = table.shape[0] * batch, triton.cdiv(widest, tile.cols)
    splits = rgb_chain_splits(matrices * tiles, pixels, tile, x.device)
    per_split = max(1, triton.cdiv(triton.cdiv(pixels, splits), tile.rows)) * tile.rows
    splits = max(1, triton.cdiv(pixels, per_split))
    part = torch.empty((matrices, splits, channels, widest), dtype=torch.float32, device=x.device)
    rgb_wgrad_chain_kernel[(matrices * splits * tiles,)](
        drgb, x, table, part, batch, pixels, splits, per_split, widest, CHANNELS=channels, ROWS=tile.rows,
        BLOCK_I=tile.cols, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    block_i = min(64, next_power_of_2(widest))
    rgb_wgrad_chain_sum_kernel[(matrices * channels * triton.cdiv(widest, block_i),)](
        part, out, table, batch, splits, widest, scale, CHANNELS=channels, BLOCK_S=32, BLOCK_I=block_i, num_warps=8,
    )  # fmt: skip


def noise_grads(rows: Tensor, strength: Tensor, noise: Tensor, grad_noise: Tensor | None) -> Tensor:
    """Parts of the noise strength's gradient (to be summed), and the gradient of given noise into `grad_noise` `[B, P]`."""
    shares, batch, pixels = rows.shape
    block = max(16, min(_NOISE_PIXELS, next_power_of_2(pixels)))
    programs = batch * triton.cdiv(pixels, block)
    parts = torch.empty(programs, dtype=torch.float32, device=rows.device)
    noise_bwd_kernel[(programs,)](
        rows, noise, noise.stride(0), strength, parts, rows if grad_noise is None else grad_noise, batch, pixels, shares,
        GRAD_NOISE=grad_noise is not None, BLOCK_P=block, num_warps=4,
    )  # fmt: skip
    return parts


def shares(spec: StackSpec, layer: int, x: Tensor) -> int:
    """Channel blocks of a layer, each of which gives a share of the ToRGB that reads it; the input's ToRGB has one."""
    if layer < 0:
        return 1
    width, inner = spec.widths[layer + 1], spec.widths[layer]
    return triton.cdiv(width, product_tile(width, inner, x.dtype, x.device).cols)
