"""Launcher of the on-chip stack for a style a pixel (csrc/kernels/stack_blend_fwd.cuh): a blend of two styles an image.

All pixels share the weights, which are not modulated; a pixel's style scales its activations, and its demodulation comes
from a quadratic form in its blend's weights. Forward only, as `cuda_onchip`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import cuda_onchip
from .cuda import _DTYPES, _load
from .cuda_onchip import LAUNCH_PIXELS, MAX_CHANNELS, MAX_WIDTH, Made, Places, Prepared
from .encoding import Encoding, cut_noise, tiles
from .spec import StackInputs, StackSpec

MAX_STYLES = 2
# waves of all multiprocessors in a launch that looks a table up, at most: 138 MB at 512 channels on 132 of them
_TILE_WAVES = 8
_UNIT = 256  # pixels that two multiprocessors work on together


def why_not(inputs: StackInputs, spec: StackSpec, dtype: torch.dtype) -> str | None:
    """None if the kernel can serve such a call, otherwise the reason."""
    count = inputs.blend.shape[-1]
    if count > MAX_STYLES:
        return f"it blends {MAX_STYLES} styles, not {count}"
    if spec.blocks:
        return "it has residual blocks"
    return cuda_onchip.why_not(spec, dtype)


why_not_encoding = cuda_onchip.why_not_encoding


def prepare(
    inputs: StackInputs, spec: StackSpec, dtype: torch.dtype, e: Encoding | None = None
) -> tuple[Prepared, Tensor | None]:
    """Tile the weights, and make what depends on the styles: demodulation forms, styles and colours of every half chunk.

    Also the styles of the streamed channels as the kernel reads them, `[B, 2, T]` of `dtype`, T a multiple of 8; None where
    nothing is streamed."""
    batch, device = inputs.batch, inputs.weights.device
    held = min(spec.widths[0], MAX_WIDTH) if e is None else e.fourier_weight.shape[0]
    plan = cuda_onchip.make_plan(spec, batch, held, MAX_STYLES)
    styles = _both(inputs.styles, 1).contiguous()
    slabs = torch.empty(plan.slab_bytes, dtype=torch.uint8, device=device)  # c W, for all images
    records = torch.empty((batch, plan.record_bytes), dtype=torch.uint8, device=device)
    rgb_bias = torch.empty(MAX_CHANNELS, dtype=torch.float32, device=device)
    streamed = spec.widths[0] - held
    row_styles = torch.empty((batch, MAX_STYLES, -(-streamed // 8) * 8), dtype=dtype, device=device) if streamed else None
    fourier = weight = bias = None
    if e is not None:
        fourier = torch.empty((batch, plan.fourier_floats), dtype=torch.float32, device=device)
        weight, bias = e.fourier_weight.float().contiguous(), e.fourier_bias.float().contiguous()
    _load().stack_pack(
        plan,
        weights=inputs.weights.data_ptr(),
        styles=styles.data_ptr(),
        style_stride=styles.stride(0),
        kind_stride=styles.stride(1),
        biases=inputs.biases.data_ptr(),
        strengths=inputs.noise_strengths.data_ptr(),
        fourier_weight=0 if e is None else weight.data_ptr(),
        fourier_bias=0 if e is None else bias.data_ptr(),
        slabs=slabs.data_ptr(),
        records=records.data_ptr(),
        fourier=0 if e is None else fourier.data_ptr(),
        row_styles=0 if row_styles is None else row_styles.data_ptr(),
        rgb_bias=rgb_bias.data_ptr(),
        dtype=_DTYPES[dtype],
        eps=spec.eps,
        gain=spec.gain,
        negative_slope=spec.negative_slope,
        demodulate=spec.demodulate,
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    return Prepared(plan, slabs, records, fourier, rgb_bias, None), row_styles


def tile_pixels(batch: int, wave: int, waves: int) -> int:
    """Pixels of each of `batch` images in one launch: of half of `waves` waves of `wave` units to all of them, as many as fill
    the last wave best, or one unit."""
    units = range(max(1, waves * wave // 2 // batch), max(1, waves * wave // batch) + 1)
    return _UNIT * min(units, key=lambda count: -(-count * batch // wave) / (count * batch))


def _tiles(pixels: int, batch: int, rgb: Tensor) -> Iterator[tuple[int, int]]:
    """(first pixel, pixels) of each launch."""
    return tiles(pixels, tile_pixels(batch, cuda_onchip.wave(rgb.device.index) // _UNIT, _TILE_WAVES))


def _both(t: Tensor, dim: int) -> Tensor:
    """The same with a second style of zeros where there is but one."""
    return t if t.shape[dim] == MAX_STYLES else torch.cat((t, torch.zeros_like(t)), dim)


def _blend(inputs: StackInputs, first: int, count: int) -> Tensor:
    return _both(inputs.blend.narrow(-2, first, count), -1).float().contiguous()


def forward(inputs: StackInputs, spec: StackSpec, rgb: Tensor) -> None:
    """The RGB sum of a stack over `inputs.x`, into `rgb` `[B, P, C]`; a skip is added."""
    x, batch = inputs.x, inputs.batch
    prepared, row_styles = prepare(inputs, spec, x.dtype)
    packing, width = spec.packing(batch), x.shape[2]
    held = min(width, MAX_WIDTH)
    styles = _both(packing.style(inputs.styles, packing.layers[0]), 1)[:, :, :held]
    for first, count in _tiles(inputs.pixels, batch, rgb):
        blend = _blend(inputs, first, count)
        rows = x.new_zeros((batch, count, -(-width // 64) * 64))
        # not a matrix product, which may round to TF32
        style = sum(blend[..., k, None] * styles[:, None, k] for k in range(MAX_STYLES))
        torch.mul(x[:, first : first + count, :held], style, out=rows[:, :, :held])
        rows[:, :, held:width] = x[:, first : first + count, held:]
        coords = None if inputs.coords is None else inputs.coords.narrow(-2, first, count).contiguous()
        cut = inputs._replace(noise=cuda_onchip.adjacent(cut_noise(inputs.noise, first, count)))
        made = None if row_styles is None else Made(rows[:, :, held:width], row_styles)
        places = Places(coords, (0, 0), first)
        cuda_onchip.launch(prepared, cut, spec, x.dtype, rows, None, places, rgb.narrow(1, first, count), blend, made=made)
    if inputs.skip is not None:
        rgb += inputs.skip


def synthesis(e: Encoding, dtype: torch.dtype, inputs: StackInputs, spec: StackSpec, rgb: Tensor) -> None:
    """The RGB sums of every point of an encoding, into `rgb` `[B, P, C]`: memory beyond it does not grow with them."""
    prepared, row_styles = prepare(inputs, spec, dtype, e)
    whole = e.table is None or cuda_onchip.as_it_lies(e, dtype)
    for first, count in tiles(e.pixels, LAUNCH_PIXELS) if whole else _tiles(e.pixels, inputs.batch, rgb):
        coords = None if e.coords is None else e.coords.narrow(-2, first, count).float().contiguous()
        places = Places(coords, (0, 0) if e.size is None else e.size, first)
        rows = cuda_onchip.embeddings(e, dtype, places, first, count)
        cut = inputs._replace(noise=cuda_onchip.adjacent(cut_noise(inputs.noise, first, count)))
        made = None if rows is None else Made(rows, row_styles)
        blend = _blend(inputs, first, count)
        cuda_onchip.launch(prepared, cut, spec, dtype, None, None, places, rgb.narrow(1, first, count), blend, made=made)
        del rows, made  # before the next is made
