"""The `cpu` backend: the stack tiled over pixels, so that a tile's activations stay in cache through all the layers.

A level is a layer and the ToRGBs that read the same input. For one image all it does to a pixel is one matrix,

    A = [ g M   g b   g nu ]    O rows: the layer, its gain folded in, since g lrelu(y) = lrelu(g y) for g > 0
        [   R     0      0 ]    C rows: the ToRGBs that read the layer's input, summed

which acts on the input with two more columns, `X = [x, 1, n]`. So bias and noise cost no pass over the tile: forward is
one product and one leaky ReLU in place, and in the backward, with `U = [dL/dy, dL/drgb]`, one product `U A` is dL/dx with
the ToRGBs' share included, and one product `U^T X` is dL/dA: N, db and dnu at once, summed over tiles in float32.

Images one after the other, tiles one after the other, always in the same order: the same bits from run to run with the
same number of threads. Inference needs memory for one image's matrices and three tiles, however many pixels there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .noise import normal_at, pixel_counters
from .packing import Matrix, activation, empty_activations
from .spec import (
    Needs,
    StackGrads,
    StackInputs,
    StackSaved,
    StackSpec,
    accumulation_dtype,
    empty_like_layout,
    is_channel_major,
)

_L2_BYTES = 1 << 20  # of a core, where torch does not tell
_PAD = 32  # elements; rows of matrices and tiles are padded to a multiple of it
_SMALLEST_TILE, _LARGEST_TILE = 256, 8192  # pixels


# --- what fits the processor ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def processor() -> dict[str, int]:
    """What torch knows of the processor's instructions and caches; empty where it does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        return dict(tell())
    probes = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_fp16": "_is_amx_fp16_supported"}
    return {name: getattr(torch.cpu, probe, bool)() for name, probe in probes.items()}


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


def _round_up(n: int) -> int:
    return -(-n // _PAD) * _PAD


# --- matrices and tiles ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """A layer and the ToRGBs that read its input.

    Attributes:
        ins, outs: channels of the input and of the layer (0 at the last level, which has none).
        layer: the layer's plan, or None.
        rgbs: plans of the ToRGBs.
        matrix: `A`, `[O + C, I + extra]`; C is 0 where no ToRGB reads, extra where there is no layer.
    """

    ins: int
    outs: int
    layer: Matrix | None
    rgbs: tuple[Matrix, ...]
    matrix: Tensor


class _Stack:
    """Plan and workspace of one call: the levels' matrices for one image, and tiles in the memory order of `x`."""

    def __init__(self, inputs: StackInputs, spec: StackSpec) -> None:
        self.inputs, self.spec = inputs, spec
        self.packing = spec.packing(inputs.batch)
        self.dtype = compute_dtype(inputs.x.dtype)
        self.wide = accumulation_dtype(inputs.x.dtype)
        self.extra = 1 + inputs.has_noise
        self.tile = tile_pixels(spec, self.dtype, inputs.pixels)
        self.levels = [self._level(number) for number in range(spec.depth + 1)]
        self.gained_biases = inputs.biases * spec.gain
        self.gained_strengths = inputs.noise_strengths * spec.gain

    def _level(self, number: int) -> _Level:
        ins = self.spec.widths[number]
        layer = self.packing.layers[number] if number < self.spec.depth else None
        outs = layer.out_features if layer is not None else 0
        rgbs = tuple(self.packing.rgbs[k] for k in self.spec.rgbs_after(number - 1))
        rows = outs + (self.spec.rgb_channels if rgbs else 0)
        columns = ins + (self.extra if layer is not None else 0)
        return _Level(ins, outs, layer, rgbs, self.new_matrix(rows, columns, self.dtype))

    def new_matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Zeros `[rows, columns]`, each row padded with zeros."""
        return self.inputs.x.new_zeros((rows, _round_up(columns)), dtype=dtype)[:, :columns]

    def new_tile(self, channels: int) -> Tensor:
        """Uninitialised `[tile, channels or more]`; `clear` it before an image."""
        x, channels = self.inputs.x, _round_up(channels)
        if not is_channel_major(x):
            return x.new_empty((self.tile, channels), dtype=self.dtype)
        # never a power of two from channel to channel, which would be few sets of the cache
        padded = x.new_empty((channels, _round_up(self.tile) + _PAD), dtype=self.dtype)
        padded[:, self.tile :].zero_()
        return padded[:, : self.tile].t()

    def tiles(self) -> Iterator[slice]:
        """The pixels of each tile."""
        for first in range(0, self.inputs.pixels, self.tile):
            yield slice(first, min(first + self.tile, self.inputs.pixels))

    def source(self, image: int, pixels: slice) -> Tensor:
        """The stack's input `[T, I]` of one tile."""
        return self.inputs.x[image if self.inputs.x.shape[0] > 1 else 0, pixels]

    def modulate(self, image: int) -> None:
        """Fill the levels' matrices for one image: modulated in float32 (float64), rounded once."""
        for number, level in enumerate(self.levels):
            if level.layer is not None:
                v, scale = self.modulated(level.layer, image)
                rows = level.matrix[: level.outs]
                if v.dtype == self.dtype:
                    torch.mul(v, scale * self.spec.gain, out=rows[:, : level.ins])
                else:
                    rows[:, : level.ins] = v.mul_(scale * self.spec.gain)
                rows[:, level.ins] = self.packing.bias(self.gained_biases, level.layer)
                if self.inputs.has_noise:
                    rows[:, level.ins + 1] = self.gained_strengths[number]
            if level.rgbs:
                parts = [v.mul_(scale) for v, scale in (self.modulated(rgb, image) for rgb in level.rgbs)]
                level.matrix[level.outs :, : level.ins] = parts[0] if len(parts) == 1 else sum(parts)

    def modulated(self, matrix: Matrix, image: int) -> tuple[Tensor, Tensor | float]:
        """`s W` `[O, I]` of one matrix for one image, and what makes it M: `c d` `[O, 1]`, or `c` without demodulation."""
        v = (
            self.packing.weight(self.inputs.weights, matrix)
            * self.packing.style(self.inputs.styles, matrix)[image]
        )
        if not matrix.demodulate:
            return v, matrix.in_features**-0.5
        # c d = c / sqrt(sum (c s W)^2 + eps), c^2 = 1 / I
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        return v, norm.square_().add_(self.spec.eps * matrix.in_features).rsqrt_()

    def columns(self, image: int, pixels: slice, needed: bool = True) -> list[Tensor]:
        """What follows the input of each layer in X for one tile: `[T, extra]`, ones and, unless it is off, noise
        (zeros if not `needed`)."""
        inputs, depth, size = self.inputs, self.spec.depth, pixels.stop - pixels.start
        block = inputs.x.new_ones((depth, self.extra, size), dtype=self.dtype)
        if inputs.has_noise and not needed:
            block[:, 1] = 0.0
        elif inputs.noise is not None:
            block[:, 1] = inputs.noise[:, image, pixels]
        elif inputs.seed is not None and depth:
            coords = inputs.coords
            if coords is not None:
                coords = coords[pixels] if coords.dim() == 2 else coords[image, pixels]
            c0, c1 = pixel_counters(size, coords, inputs.x.device, first=pixels.start)
            layer = torch.arange(self.spec.first_layer, self.spec.first_layer + depth)[:, None]
            block[:, 1] = normal_at(inputs.seed, c0, c1, torch.tensor(image), layer)
        return [layer_block.t() for layer_block in block.unbind()]


def _clear(tile: Tensor, widths: tuple[int, ...]) -> None:
    """Zero what a tile for `widths` channels may hold past the end of a row. oneDNN's AMX product reads up to 31 numbers
    there and multiplies them by zero: harmless unless fresh memory, or another image, has inf or NaN there."""
    tile[:, min(widths) :].zero_()


# --- forward --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """The views that one level works on for tiles of one size; weights are `A` transposed."""

    x: Tensor
    columns: Tensor
    extended: Tensor
    layer: Tensor
    out: Tensor
    rgb: Tensor | None


def _steps(stack: _Stack, buffers: list[Tensor], size: int) -> list[_Step]:
    """Level `l` reads `buffers[l]` and writes `buffers[l + 1]`."""
    steps = []
    for level, buffer, target in zip(stack.levels, buffers, [*buffers[1:], buffers[0]]):
        end = level.matrix.shape[1]
        x = buffer[:size]
        rgb = level.matrix[level.outs :, : level.ins].t() if level.rgbs else None
        layer, out = level.matrix[: level.outs].t(), target[:size, : level.outs]
        steps.append(_Step(x[:, : level.ins], x[:, level.ins : end], x[:, :end], layer, out, rgb))
    return steps


@torch.no_grad()
def forward(
    inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool
) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call: the last layer's features, the RGB sum, and what the backward needs.

    What is saved: features and activations as `packing` plans them, but where `x` is channel-major each layer's region
    holds `[B, O, P]`. The backward makes its matrices anew, so `mods` is zeros.
    """
    x, batch = inputs.x, inputs.batch
    stack = _Stack(inputs, spec)
    features, activations, mods = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    keep_features = bool(spec.depth) and (want_features or save)
    if keep_features:
        features = empty_like_layout(x, batch, spec.widths[-1], x.dtype)
    if save:
        activations = empty_activations(x, spec.widths, batch, inputs.pixels)
        mods = x.new_zeros(stack.packing.mod_numel)
    saved = (
        [_saved_output(activations, inputs, spec, layer) for layer in range(spec.depth - 1)] if save else []
    )
    rgb = empty_like_layout(x, batch, spec.rgb_channels if spec.rgb_after else 0, stack.wide)
    rgb_bias = sum(stack.packing.bias(inputs.biases, matrix) for matrix in stack.packing.rgbs)
    # the input is often wider than the layers: apart, it does not widen their tiles
    buffers = [stack.new_tile(spec.widths[0] + stack.extra)]
    if spec.depth:
        pair = [stack.new_tile(max(spec.widths[1:]) + stack.extra) for _ in range(2)]
        buffers += [pair[layer % 2] for layer in range(spec.depth)]
    plans = {size: _steps(stack, buffers, size) for size in {p.stop - p.start for p in stack.tiles()}}
    for image in range(batch):
        stack.modulate(image)
        _clear(buffers[0], spec.widths[:1])
        for buffer in buffers[1:3]:
            _clear(buffer, spec.widths[1:])
        for pixels in stack.tiles():
            steps = plans[pixels.stop - pixels.start]
            columns = stack.columns(image, pixels)
            if spec.rgb_after:
                total = rgb_bias.expand(len(steps[0].x), -1).clone()
                if inputs.skip is not None:
                    total += inputs.skip[image, pixels]
            steps[0].x.copy_(stack.source(image, pixels))
            for number, step in enumerate(steps):
                if step.rgb is not None:
                    total += torch.mm(step.x, step.rgb)
                if number == spec.depth:
                    break
                step.columns.copy_(columns[number])
                torch.mm(step.extended, step.layer, out=step.out)
                if spec.negative_slope != 1.0:
                    torch.nn.functional.leaky_relu_(step.out, spec.negative_slope)
                if number < len(saved):
                    saved[number][image, pixels] = step.out
            if keep_features:
                features[image, pixels] = steps[-1].x
            if spec.rgb_after:
                rgb[image, pixels] = total
    return features, rgb, StackSaved(features, activations, mods)


def _saved_output(activations: Tensor, inputs: StackInputs, spec: StackSpec, layer: int) -> Tensor:
    """View `[B, P, O]` of a saved layer output, in the memory order of `x`."""
    kept = activation(activations, spec.widths, inputs.batch, inputs.pixels, layer)
    if is_channel_major(inputs.x):
        return kept.view(kept.shape[0], kept.shape[2], kept.shape[1]).transpose(1, 2)
    return kept


# --- backward -------------------------------------------------------------------------------------------------------


class _Gradients:
    """Gradients of the parameters: dL/dA of one image, summed over its tiles, then over images what follows from it."""

    def __init__(self, stack: _Stack, needs: Needs) -> None:
        inputs = stack.inputs
        self.stack, self.needs = stack, needs
        self.any = needs.weights or needs.biases or needs.noise
        self.weights, self.styles = torch.zeros_like(inputs.weights), torch.zeros_like(inputs.styles)
        self.biases, self.strengths = (
            torch.zeros_like(inputs.biases),
            torch.zeros_like(inputs.noise_strengths),
        )
        self.sums = [stack.new_matrix(*level.matrix.shape, stack.wide) for level in stack.levels]

    def add(self, number: int, u: Tensor, x: Tensor) -> None:
        """Add `U^T X` of a tile: `u` `[T, rows]`, `x` `[T, I + extra]`."""
        # without the weights' gradients only the last columns are asked for
        first = 0 if self.needs.weights else self.stack.levels[number].ins
        total = self.sums[number][: u.shape[1], first:]
        if u.dtype == total.dtype:
            total.addmm_(u.t(), x[:, first:])
        else:
            # converted in a pass of its own: an addition of mixed dtypes is not vectorised
            total += torch.mm(u.t(), x[:, first:]).to(total.dtype)

    def finish(self, image: int) -> None:
        """Take the image's dL/dA into the gradients, and start the next from zero."""
        stack, packing = self.stack, self.stack.packing
        for number, (level, total) in enumerate(zip(stack.levels, self.sums)):
            if level.layer is not None:
                layer = total[: level.outs].mul_(stack.spec.gain)
                packing.bias(self.biases, level.layer).add_(layer[:, level.ins])
                if stack.inputs.has_noise:
                    self.strengths[number] += layer[:, level.ins + 1].sum()
            if self.needs.weights:
                for matrix in (level.layer, *level.rgbs):
                    if matrix is not None:
                        rows = total[: level.outs] if matrix is level.layer else total[level.outs :]
                        self._modulated(matrix, rows[:, : level.ins], image)
            total.zero_()

    def _modulated(self, matrix: Matrix, n: Tensor, image: int) -> None:
        """Add what follows from `n` = dL/dM `[O, I]`: dV = d (N - M t), t = sum_j N M; dW = c s dV; ds = c W dV."""
        packing, inputs = self.stack.packing, self.stack.inputs
        v, scale = self.stack.modulated(matrix, image)
        dv = n * scale  # c dV, to be
        if matrix.demodulate:
            t = (dv * v).sum(1, keepdim=True).mul_(scale.square())
            dv.addcmul_(v, t, value=-1.0)
        packing.weight(self.weights, matrix).addcmul_(dv, packing.style(inputs.styles, matrix)[image])
        packing.style(self.styles, matrix)[image] = (dv * packing.weight(inputs.weights, matrix)).sum(0)


@torch.no_grad()
def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    saved: StackSaved,
    needs: Needs,
) -> StackGrads:
    """Serve a backward call: for each image and tile, the levels from the last to the first."""
    x, depth = inputs.x, spec.depth
    stack = _Stack(inputs, spec)
    grads = _Gradients(stack, needs)
    shared = x.shape[0] < inputs.batch
    grad_x = grad_noise = None
    if needs.x:
        grad_x = empty_like_layout(x, x.shape[0], x.shape[2], stack.wide if shared else x.dtype)
    if inputs.noise is not None and needs.noise:
        grad_noise = torch.zeros_like(inputs.noise, memory_format=torch.contiguous_format)
    if grad_rgb is not None:
        for matrix in stack.packing.rgbs:
            stack.packing.bias(grads.biases, matrix).copy_(grad_rgb.sum((0, 1), dtype=stack.wide))
    outputs = [_saved_output(saved.activations, inputs, spec, layer) for layer in range(depth - 1)]
    outputs += [saved.features] if depth else []
    x_tile = stack.new_tile(max(spec.widths) + stack.extra)
    u_tiles = [stack.new_tile(max(spec.widths) + spec.rgb_channels) for _ in range(2)]
    for image in range(inputs.batch):
        stack.modulate(image)
        for tile in (x_tile, *u_tiles):
            _clear(tile, spec.widths)
        for pixels in stack.tiles():
            size = pixels.stop - pixels.start
            columns = stack.columns(image, pixels, needs.noise)
            u, next_u = u_tiles[0][:size], u_tiles[1][:size]
            for number in range(depth, -1, -1):
                level = stack.levels[number]
                rows = level.outs
                if level.rgbs and grad_rgb is not None:
                    u[:, rows : rows + spec.rgb_channels] = grad_rgb[image, pixels]
                    rows += spec.rgb_channels
                h = x_tile[:size, : level.ins]
                h.copy_(outputs[number - 1][image, pixels] if number else stack.source(image, pixels))
                if grads.any and rows:
                    end = level.matrix.shape[1]
                    if number < depth:
                        x_tile[:size, level.ins : end] = columns[number]
                    grads.add(number, u[:, :rows], x_tile[:size, :end])
                if number == 0 and grad_x is None:
                    break
                grad = next_u[:, : level.ins]
                if rows:
                    torch.mm(u[:, :rows], level.matrix[:rows, : level.ins], out=grad)
                else:
                    grad.zero_()
                if number == depth and grad_features is not None:
                    grad += grad_features[image, pixels]
                if number == 0:
                    kept = grad_x[0 if shared else image, pixels]
                    kept.add_(grad) if shared and image else kept.copy_(grad)
                    break
                if spec.negative_slope != 1.0:
                    # the sign of an output is that of its input, so the output serves
                    torch.ops.aten.leaky_relu_backward.grad_input(
                        grad, h, spec.negative_slope, True, grad_input=grad
                    )
                if grad_noise is not None:
                    row_sums = grad.sum(1, dtype=stack.wide)
                    grad_noise[number - 1, image, pixels] = row_sums * stack.gained_strengths[number - 1]
                u, next_u = next_u, u
        grads.finish(image)
    if grad_x is not None:
        grad_x = grad_x.to(x.dtype)
    return StackGrads(grad_x, grads.weights, grads.styles, grads.biases, grads.strengths, grad_noise)
