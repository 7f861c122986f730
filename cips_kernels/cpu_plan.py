"""What the cpu backend computes with: the dtype and size of a tile, one image's matrices, and a tile's extra columns.

A level is a layer and the ToRGBs that read the same input. For one image all it does to a pixel is one matrix,

    A = [ g M   g b   g nu ]    O rows: the layer, its gain folded in, since g lrelu(y) = lrelu(g y) for g > 0
        [   R     0      0 ]    C rows: the ToRGBs that read the layer's input, summed

which acts on the input with two more columns, `X = [x, 1, n]`.

Where a residual block ends, `(y + skip(x)) / sqrt(2)`, the layer's g takes the factor in: its output is `y / sqrt(2)`,
to which `E x` is added, `E = c W / sqrt(2)` or `1 / sqrt(2)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .noise import normal_at, pixel_counters
from .spec import SQRT_HALF, StackInputs, StackSpec, accumulation_dtype, is_channel_major

_L2_BYTES = 1 << 20  # of a core, where torch does not tell
_READ_PAST = 32  # rows or numbers past the end of an operand that a product may read, and multiply by zero
_PAD = 32  # elements; rows of matrices and tiles are padded to a multiple of it
_GRAIN = 1 << 15  # numbers below which torch's elementwise operations stay on one thread
_SMALLEST_TILE, _LARGEST_TILE = 256, 16384  # pixels


def _round_up(n: int) -> int:
    return -(-n // _PAD) * _PAD


def _padded(matrix: Tensor) -> Tensor:
    """A matrix `[rows, columns]` of `Plan.new_matrices` with what pads its rows."""
    return matrix.as_strided((matrix.shape[0], matrix.stride(0)), matrix.stride())


# --- what fits the processor ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def processor() -> dict[str, int]:
    """What torch knows of the processor's instructions and caches; little where it does not tell. Without oneDNN it has
    no fast products of half precision, whatever the processor's instructions."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        known = dict(tell())
    else:
        probes = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_fp16": "_is_amx_fp16_supported"}
        known = {name: getattr(torch.cpu, probe, bool)() for name, probe in probes.items()}
    if torch.backends.mkldnn.is_available():
        return known
    return {name: value for name, value in known.items() if name.endswith("cache_size")}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tile's activations, for `x` of `dtype`.

    float32 and float64 are computed as they are; bfloat16 where the processor multiplies it (AVX512-BF16, AMX, Arm's
    bf16), float16 where it has AMX-FP16. Elsewhere both are computed in float32 and rounded where they leave the tile:
    at least as fast there, and more exact.
    """
    fast = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
        torch.float16: ("amx_fp16",),
    }.get(dtype)
    if fast is None or any(processor().get(name) for name in fast):
        return dtype
    return torch.float32


def tile_pixels(spec: StackSpec, dtype: torch.dtype, pixels: int) -> int:
    """Pixels of a tile with activations of `dtype`: as many as make a layer's input, or its output, the size of the L2
    caches of the threads, in tiles of even size.

    A product costs some microseconds a call by itself, most of them for packing its weights, which larger tiles spread
    over more pixels; tiles of twice this size are slower again, as are tiles of half. Measured with 15 layers of 512 on
    two cores with 2 MB each: 1024 pixels a core in float32, 2048 in bfloat16.
    """
    mean_width = sum(spec.widths) / len(spec.widths)
    cache = torch.get_num_threads() * (processor().get("l2_cache_size") or _L2_BYTES)
    fitting = cache / (dtype.itemsize * mean_width)
    count = max(1, round(pixels / min(max(fitting, _SMALLEST_TILE), _LARGEST_TILE)))
    return -(-pixels // count)


# --- modulation -----------------------------------------------------------------------------------------------------


def row_scales(weight: Tensor, styles: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`c d` `[B, O]` of a demodulated `weight` `[O, I]` and `styles` `[B, I]`: the squared norms of all images' rows
    are one small product, `s^2 (W^2)^T`."""
    squares = torch.mm(styles.square(), weight.square().t(), out=out)
    return _reciprocal(squares, eps, weight.shape[1])


def _reciprocal(squares: Tensor, eps: float, channels: int) -> Tensor:
    """`c d = c / sqrt(sum (c s W)^2 + eps)`, where `c^2 = 1 / I`, in place of `sum (s W)^2`."""
    return squares.add_(eps * channels).rsqrt_()


@dataclass(frozen=True)
class MatrixGradient:
    """Gradients `grad_weight` `[O, I]` and `grad_styles` `[B, I]` of one matrix, from N = dL/dM image by image."""

    weight: Tensor
    styles: Tensor
    demodulate: bool
    grad_weight: Tensor
    grad_styles: Tensor

    def add(self, image: int, n: Tensor, scale: Tensor | float, gain: float = 1.0) -> None:
        """Add what follows from `gain n` = N `[O, I]`; the first image overwrites what the gradients held.

        With `scale` k `[O, 1]` (`c d`, or `c` without demodulation), `v = s W` and `M = k v`:
        `dV = k (N - M sum_j N M)`, `dW = sum_b s dV`, `ds = sum_i W dV`.
        """
        style = self.styles[image]
        dv = n * (scale * gain)
        if self.demodulate:
            # number by number: sums of what has not cancelled yet would lose digits where N is nearly along M
            v = self.weight * style
            dv.addcmul_(v, (dv * v).sum(1, keepdim=True).mul_(scale).mul_(scale), value=-1.0)
        if image:
            self.grad_weight.addcmul_(dv, style)
        else:
            torch.mul(dv, style, out=self.grad_weight)
        torch.sum(dv.mul_(self.weight), 0, out=self.grad_styles[image])


# --- matrices and tiles ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A layer and the ToRGBs that read its input.

    Attributes:
        ins, outs: channels of the input and of the layer (0 at the last level, which has none).
        layer: the layer's place in `Packing.matrices`, or None.
        rgbs: places of the ToRGBs.
        rows, columns: of `A`: `O + C` and `I + extra`; C is 0 where no ToRGB reads, extra where there is no layer.
    """

    ins: int
    outs: int
    layer: int | None
    rgbs: tuple[int, ...]
    rows: int
    columns: int


class Plan:
    """Plan and workspace of one call.

    Attributes:
        dtype, wide: of a tile, and of sums over pixels.
        tile: pixels of a tile; the last may have fewer.
        extra: columns after the input, 2 with noise and 1 without.
        levels: one more than there are layers, for the ToRGBs that read the last.
        matrices: `A` of every level for one image.
        gains: g of every layer.
        skips: `E` of every residual block, None where it is a number.
        weights, styles: `[O, I]` and `[B, I]` of every matrix, layers first: views of the flat tensors.
        scales: `c d` `[B, O, 1]` of every matrix; only what was modulated, and demodulates, is filled.
    """

    def __init__(self, inputs: StackInputs, spec: StackSpec) -> None:
        self.inputs, self.spec = inputs, spec
        self.packing = spec.packing(inputs.batch)
        self.dtype = compute_dtype(inputs.x.dtype)
        self.wide = accumulation_dtype(inputs.x.dtype)
        self.tile = tile_pixels(spec, self.dtype, inputs.pixels)
        self.extra = 1 + inputs.has_noise
        self._strip, self._strip_of = inputs.x.new_empty(0), (-1, -1)
        self.gains = [spec.gain_of(layer) for layer in range(spec.depth)]
        self.gained_biases = inputs.biases * spec.gain
        self.gained_strengths = inputs.noise_strengths * spec.gain
        for _, last in spec.blocks:
            self.packing.bias(self.gained_biases, self.packing.layers[last]).mul_(SQRT_HALF)
            self.gained_strengths[last] *= SQRT_HALF
        self.weights = [self.packing.weight(inputs.weights, matrix) for matrix in self.packing.matrices]
        self.styles = [self.packing.style(inputs.styles, matrix) for matrix in self.packing.matrices]
        # in one piece: small tensors that stay would split the heap, where a layer's large ones come and go
        scales = inputs.biases.new_empty((inputs.batch, self.packing.bias_numel))
        self.scales = [
            scales.narrow(1, matrix.bias_offset, matrix.out_features).unsqueeze(2)
            for matrix in self.packing.matrices
        ]
        self.levels = [self._level(number) for number in range(spec.depth + 1)]
        self.matrices = self.new_matrices(self.dtype)
        self.skips = [self._skip(block) for block in range(len(spec.blocks))]

    def _level(self, number: int) -> Level:
        ins = self.spec.widths[number]
        layer = number if number < self.spec.depth else None
        outs = self.spec.widths[number + 1] if layer is not None else 0
        rgbs = tuple(self.spec.depth + k for k in self.spec.rgbs_after(number - 1))
        rows = outs + (self.spec.rgb_channels if rgbs else 0)
        return Level(ins, outs, layer, rgbs, rows, ins + (self.extra if layer is not None else 0))

    def _skip(self, block: int) -> Tensor | None:
        """`E` `[O, I]`, rounded once; rows and end padded with zeros as those of `new_matrices`."""
        skip = self.packing.skips[block]
        if skip is None:
            return None
        shape = skip.out_features + _READ_PAST, _round_up(skip.in_features)
        matrix = self.inputs.x.new_zeros(shape, dtype=self.dtype)[: skip.out_features, : skip.in_features]
        return matrix.copy_(self.packing.weight(self.inputs.weights, skip) * self.skip_scale(block))

    def skip_scale(self, block: int) -> float:
        """What the block's matrix is multiplied with in `E`: `c / sqrt(2)`, or `1 / sqrt(2)` where it has none."""
        skip = self.packing.skips[block]
        return SQRT_HALF if skip is None else SQRT_HALF * skip.in_features**-0.5

    def new_matrices(self, dtype: torch.dtype) -> list[Tensor]:
        """`[rows, columns]` of every level, each row padded, zeros in the padding and past the end. Where all pixels are
        one tile they lie in the same place, since each is wanted once."""
        widths = [_round_up(level.columns) for level in self.levels]
        sizes = [level.rows * width for level, width in zip(self.levels, widths)]
        starts = [
            0 if self.tile >= self.inputs.pixels else sum(sizes[:number]) for number in range(len(sizes))
        ]
        size = max(map(sum, zip(starts, sizes))) + _READ_PAST * max(widths)
        memory = self.inputs.x.new_zeros(size, dtype=dtype)
        return [
            memory.narrow(0, start, size).view(level.rows, width)[:, : level.columns]
            for start, size, level, width in zip(starts, sizes, self.levels, widths)
        ]

    def modulate(self, number: int, image: int) -> None:
        """Fill a level's matrix for one image: modulated in float32 (float64), rounded once."""
        level, matrix = self.levels[number], self.matrices[number]
        _padded(matrix)[:, level.ins :].zero_()
        if level.layer is not None:
            rows = matrix[: level.outs]
            v, scale = self.modulated(level.layer, image, rows[:, : level.ins])
            v.mul_(scale * self.gains[number])
            if v.dtype != self.dtype:
                rows[:, : level.ins] = v
            rows[:, level.ins] = self.packing.bias(self.gained_biases, self.packing.matrices[level.layer])
            if self.inputs.has_noise:
                rows[:, level.ins + 1] = self.gained_strengths[number]
        if level.rgbs:
            parts = [v.mul_(scale) for v, scale in (self.modulated(rgb, image) for rgb in level.rgbs)]
            matrix[level.outs :, : level.ins] = parts[0] if len(parts) == 1 else sum(parts)

    def modulated(self, index: int, image: int, out: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        """`s W` `[O, I]` of one matrix for one image, and what makes it M: `c d` `[O, 1]`, or `c` without demodulation.

        It lies in `out` if that has its dtype, otherwise in memory of its own.
        """
        matrix, weight, styles = self.packing.matrices[index], self.weights[index], self.styles[index]
        scales, several = self.scales[index], self.inputs.batch > 1
        if matrix.demodulate and several and image == 0:
            row_scales(weight, styles, self.spec.eps, out=scales.squeeze(2))
        v = torch.mul(
            weight, styles[image], out=out if out is not None and out.dtype == weight.dtype else None
        )
        if not matrix.demodulate:
            return v, matrix.in_features**-0.5
        if not several:  # a single image's norms are cheaper this way
            squares = torch.linalg.vector_norm(v, dim=1, keepdim=True, out=scales[0]).square_()
            _reciprocal(squares, self.spec.eps, matrix.in_features)
        return v, scales[image]

    def tiles(self) -> Iterator[slice]:
        """The pixels of each tile."""
        for first in range(0, self.inputs.pixels, self.tile):
            yield slice(first, min(first + self.tile, self.inputs.pixels))

    def new_tile(self, channels: int) -> Tensor:
        """Zeros `[tile, channels or more]` in the memory order of `x`; `clear` it before a second image."""
        x, channels = self.inputs.x, _round_up(channels)
        if not is_channel_major(x):
            return x.new_zeros((self.tile + _READ_PAST, channels), dtype=self.dtype)[: self.tile]
        # never a power of two from channel to channel, which would be few sets of the cache
        padded = x.new_zeros((channels + _READ_PAST, _round_up(self.tile) + _PAD), dtype=self.dtype)
        return padded[:channels, : self.tile].t()

    def source(self, image: int, pixels: slice) -> Tensor:
        """The stack's input `[T, I]` of one tile."""
        return self.inputs.x[image if self.inputs.x.shape[0] > 1 else 0, pixels]

    def extra_columns(self, image: int, pixels: slice, noise: bool = True) -> list[Tensor]:
        """What follows the input of each layer in X for one tile: `[T, extra]`, ones and, unless it is off, the layer's
        noise (zeros if not `noise`)."""
        # drawn for several tiles at once: torch gives a thread no less than a grain of numbers
        grains = min(torch.get_num_threads(), 8) * _GRAIN
        tiles = max(1, grains // max(1, self.spec.depth * self.tile))
        start = pixels.start - pixels.start % (tiles * self.tile)
        if self._strip_of != (image, start):
            stop = min(start + tiles * self.tile, self.inputs.pixels)
            self._strip_of, self._strip = (image, start), self._extra_rows(image, slice(start, stop), noise)
        strip = self._strip[:, :, pixels.start - start : pixels.stop - start]
        return [rows.t() for rows in strip.unbind()]

    def _extra_rows(self, image: int, pixels: slice, noise: bool) -> Tensor:
        """`[L, extra, pixels]`: ones, and noise."""
        inputs, depth, size = self.inputs, self.spec.depth, pixels.stop - pixels.start
        rows = inputs.x.new_ones((depth, self.extra, size), dtype=self.dtype)
        if inputs.has_noise and not noise:
            rows[:, 1] = 0.0
        elif inputs.noise is not None:
            rows[:, 1] = inputs.noise[:, image, pixels]
        elif inputs.seed is not None and depth:
            coords = inputs.coords
            if coords is not None:
                coords = coords[pixels] if coords.dim() == 2 else coords[image, pixels]
            c0, c1 = pixel_counters(size, coords, inputs.x.device, first=pixels.start)
            layer = torch.arange(self.spec.first_layer, self.spec.first_layer + depth)[:, None]
            rows[:, 1] = normal_at(inputs.seed, c0, c1, torch.tensor(image), layer)
        return rows


def clear(*tiles: Tensor) -> None:
    """Zero used tiles before another image. oneDNN's AMX product reads up to 31 numbers or rows past the end of an
    operand and multiplies them by zero: harmless unless fresh memory, or another image, has inf or NaN there."""
    for tile in tiles:
        tile.zero_()
