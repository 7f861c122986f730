"""The `cpu` backend: the stack tiled over pixels, so that a tile's activations stay in cache through all the layers.

With the matrix A of a level and the extended input X of a tile (see cpu_plan), bias, noise and gain cost no pass over the
tile: forward is one product `X A^T` and one leaky ReLU in place. In the backward, with `U = [dL/dy, dL/drgb]`, one product
`U A` is dL/dx with the ToRGBs' share included, and one product `U^T X` is dL/dA: N, db and dnu at once, summed over tiles
in float32.

Images one after the other, tiles one after the other, always in the same order: the same bits from run to run with the
same number of threads. Inference needs memory for one image's matrices and three tiles, however many pixels there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cpu_plan import MatrixGradient, Plan, clear, row_scales
from .packing import activation, empty_activations, summand
from .spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, empty_like_layout, is_channel_major

# --- forward --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """The views that one level works on, for tiles of one size: `x` `[T, I]`, the columns after it, both together, the
    next tile's input, and the level's weights transposed."""

    x: Tensor
    columns: Tensor
    extended: Tensor
    out: Tensor
    layer: Tensor
    rgb: Tensor | None


def _steps(plan: Plan, tiles: list[Tensor], size: int) -> list[_Step]:
    """Level `l` reads `tiles[l]` and writes `tiles[l + 1]`; a block's output is written over its last layer's."""
    steps = []
    for number, (level, matrix) in enumerate(zip(plan.levels, plan.matrices)):
        tile, target = tiles[number][:size], tiles[min(number + 1, plan.spec.depth)][:size]
        rgb = matrix[level.outs :, : level.ins].t() if level.rgbs else None
        views = (tile[:, : level.ins], tile[:, level.ins : level.columns], tile[:, : level.columns])
        steps.append(_Step(*views, target[:, : level.outs], matrix[: level.outs].t(), rgb))
    return steps


def _saved(activations: Tensor, inputs: StackInputs, spec: StackSpec) -> tuple[list[Tensor], list[Tensor]]:
    """Views `[B, P, O]` of what is saved, in the memory order of `x`: the outputs of all layers but the last, and what
    each residual block's last layer gave before the addition."""
    sizes = (spec.widths, inputs.batch, inputs.pixels)
    outputs = [activation(activations, *sizes, layer) for layer in range(spec.depth - 1)]
    summands = [summand(activations, *sizes, spec.blocks, block) for block in range(len(spec.blocks))]
    if is_channel_major(inputs.x):
        turned = [
            [kept.view(kept.shape[0], kept.shape[2], kept.shape[1]).transpose(1, 2) for kept in views]
            for views in (outputs, summands)
        ]
        return turned[0], turned[1]
    return outputs, summands


def _add_skip(plan: Plan, block: int, x: Tensor, to: Tensor, backwards: bool = False) -> None:
    """Add `E x` of a residual block to the tile `to`; `backwards`, `E^T x`."""
    matrix = plan.skips[block]
    if matrix is None:
        to.add_(x, alpha=plan.skip_scale(block))
    else:
        to.addmm_(x, matrix if backwards else matrix.t())


@torch.no_grad()
def forward(
    inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool
) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call: the last layer's features, the RGB sum, and what the backward needs.

    What is saved: features and activations as `packing` plans them, but where `x` is channel-major each region holds
    `[B, O, P]`; of a block's last layer `y / sqrt(2)`, which has the sign of y. The backward makes its matrices anew,
    so `mods` is empty.
    """
    x, batch, depth = inputs.x, inputs.batch, spec.depth
    plan = Plan(inputs, spec)
    features, activations, mods = (x.new_empty(0) for _ in range(3))
    keep_features = depth > 0 and (want_features or save)
    if keep_features:
        features = empty_like_layout(x, batch, spec.widths[-1], x.dtype)
    if save:
        activations = empty_activations(x, spec.widths, batch, inputs.pixels, spec.blocks)
    saved, summands = _saved(activations, inputs, spec) if save else ([], [])
    rgb = empty_like_layout(x, batch, spec.rgb_channels if spec.rgb_after else 0, plan.wide)
    rgb_bias = sum(plan.packing.bias(inputs.biases, matrix) for matrix in plan.packing.rgbs)
    # the input is often wider than the layers: apart, it does not widen their tiles
    first = plan.new_tile(spec.widths[0] + plan.extra)
    numbers = spec.output_buffers()
    others = [plan.new_tile(max(spec.widths[1:]) + plan.extra) for _ in range(max(numbers, default=-1) + 1)]
    tiles = [first] + [others[number] for number in numbers]
    steps_of = {size: _steps(plan, tiles, size) for size in {p.stop - p.start for p in plan.tiles()}}
    for image in range(batch):
        if image:
            clear(first, *others)
        for pixels in plan.tiles():
            steps = steps_of[pixels.stop - pixels.start]
            columns = plan.extra_columns(image, pixels)
            if spec.rgb_after:
                total = rgb_bias.expand(len(steps[0].x), -1).clone()
                if inputs.skip is not None:
                    total += inputs.skip[image, pixels]
            steps[0].x.copy_(plan.source(image, pixels))
            for number, step in enumerate(steps):
                if pixels.start == 0:
                    plan.modulate(number, image)
                if step.rgb is not None:
                    total += torch.mm(step.x, step.rgb)
                if number == depth:
                    break
                step.columns.copy_(columns[number])
                torch.mm(step.extended, step.layer, out=step.out)
                if spec.negative_slope != 1.0:
                    torch.nn.functional.leaky_relu_(step.out, spec.negative_slope)
                block = spec.block_to(number)
                if block is not None:
                    if summands:
                        summands[block][image, pixels] = step.out
                    _add_skip(plan, block, steps[spec.blocks[block][0]].x, step.out)
                if number < len(saved):
                    saved[number][image, pixels] = step.out
            if keep_features:
                features[image, pixels] = steps[-1].x
            if spec.rgb_after:
                rgb[image, pixels] = total
    return features, rgb, StackSaved(features, activations, mods)


# --- backward -------------------------------------------------------------------------------------------------------


class _Gradients:
    """Gradients of the parameters: dL/dA of one image, summed over its tiles, and over images what follows from it."""

    def __init__(self, plan: Plan, needs: Needs, every_matrix: bool) -> None:
        inputs = plan.inputs
        self.plan, self.needs = plan, needs
        # a matrix's first image overwrites, unless there are matrices that no gradient reaches
        self.weights = torch.empty_like(inputs.weights) if every_matrix else torch.zeros_like(inputs.weights)
        self.styles = torch.zeros_like(inputs.styles)
        self._matrices = [self._matrix(index) for index in range(len(plan.packing.matrices))]
        self.biases, self.strengths = (
            torch.zeros_like(inputs.biases),
            torch.zeros_like(inputs.noise_strengths),
        )
        self.sums = plan.new_matrices(plan.wide)
        for skip in plan.packing.skips:
            if skip is not None:
                plan.packing.weight(self.weights, skip).zero_()

    def _matrix(self, index: int) -> MatrixGradient:
        plan, matrix = self.plan, self.plan.packing.matrices[index]
        grads = plan.packing.weight(self.weights, matrix), plan.packing.style(self.styles, matrix)
        return MatrixGradient(plan.weights[index], plan.styles[index], matrix.demodulate, *grads)

    def add(self, number: int, image: int, pixels: slice, u: Tensor, x: Tensor) -> None:
        """Add a tile: `U` `[T, rows]` and `X` `[T, I + extra]`; with the image's last one, dL/dA is complete."""
        total = self.sums[number]
        if pixels.start == 0:
            total.zero_()
        # without the weights' gradients only the last columns are asked for
        first = 0 if self.needs.weights else self.plan.levels[number].ins
        total, x = total[: u.shape[1], first:], x[:, first:]
        if u.dtype == total.dtype:
            total.addmm_(u.t(), x)
        else:
            # converted in a pass of its own: an addition of mixed dtypes is not vectorised
            total += torch.mm(u.t(), x).to(total.dtype)
        if pixels.stop == self.plan.inputs.pixels:
            self._finish(number, image)

    def add_skip(self, block: int, grad: Tensor, x: Tensor) -> None:
        """Add a tile to the gradient of a block's matrix: `grad` `[T, O]` of the block's output, `x` `[T, I]`."""
        skip = self.plan.packing.skips[block]
        if skip is None or not self.needs.weights:
            return
        total, scale = self.plan.packing.weight(self.weights, skip), self.plan.skip_scale(block)
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), x, alpha=scale)
        else:
            total.add_(torch.mm(grad.t(), x).to(total.dtype), alpha=scale)

    def _finish(self, number: int, image: int) -> None:
        """Take an image's dL/dA of one level into the gradients."""
        plan, packing, level, total = (
            self.plan,
            self.plan.packing,
            self.plan.levels[number],
            self.sums[number],
        )
        if level.layer is not None:
            layer, gain = total[: level.outs], plan.gains[number]
            packing.bias(self.biases, packing.matrices[level.layer]).add_(layer[:, level.ins], alpha=gain)
            if plan.inputs.has_noise:
                self.strengths[number] += layer[:, level.ins + 1].sum() * gain
            if self.needs.weights:
                c = plan.weights[level.layer].shape[1] ** -0.5
                scale = plan.scales[level.layer][image] if plan.spec.demodulate else c
                self._matrices[level.layer].add(image, layer[:, : level.ins], scale, gain)
        if self.needs.weights:
            for rgb in level.rgbs:
                self._matrices[rgb].add(image, total[level.outs :, : level.ins], level.ins**-0.5)


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
    plan = Plan(inputs, spec)
    grads = _Gradients(plan, needs, every_matrix=grad_rgb is not None or not spec.rgb_after)
    shared = x.shape[0] < inputs.batch
    grad_x = grad_noise = None
    if needs.x:
        grad_x = empty_like_layout(x, x.shape[0], x.shape[2], plan.wide if shared else x.dtype)
    if inputs.noise is not None and needs.noise:
        grad_noise = torch.zeros_like(inputs.noise, memory_format=torch.contiguous_format)
    if grad_rgb is not None:
        for matrix in plan.packing.rgbs:
            plan.packing.bias(grads.biases, matrix).copy_(grad_rgb.sum((0, 1), dtype=plan.wide))
    outputs, summands = _saved(saved.activations, inputs, spec)
    outputs.append(saved.features)
    x_tile = plan.new_tile(max(spec.widths) + plan.extra)
    u_tiles = [plan.new_tile(max(spec.widths) + spec.rgb_channels) for _ in range(2)]
    # the gradient of the output of the block that the chain is in
    block_tile = plan.new_tile(max(spec.widths)) if spec.blocks else None
    for image in range(inputs.batch):
        if image:
            clear(x_tile, *u_tiles, *([] if block_tile is None else [block_tile]))
        for pixels in plan.tiles():
            size = pixels.stop - pixels.start
            columns = plan.extra_columns(image, pixels, needs.noise)
            u, next_u = u_tiles[0][:size], u_tiles[1][:size]
            for number in range(depth, -1, -1):
                level, rows = plan.levels[number], plan.levels[number].outs
                if pixels.start == 0:
                    plan.modulate(number, image)
                h = x_tile[:size, : level.ins]
                h.copy_(outputs[number - 1][image, pixels] if number else plan.source(image, pixels))
                if level.rgbs and grad_rgb is not None:
                    u[:, rows : level.rows] = grad_rgb[image, pixels]
                    rows = level.rows
                if rows and (needs.weights or needs.biases or needs.noise):
                    if number < depth:
                        x_tile[:size, level.ins : level.columns] = columns[number]
                    grads.add(number, image, pixels, u[:, :rows], x_tile[:size, : level.columns])
                begins, ends = spec.block_from(number), spec.block_to(number - 1)
                if begins is not None:
                    block_grad = block_tile[:size, : spec.widths[spec.blocks[begins][1] + 1]]
                    grads.add_skip(begins, block_grad, h)
                if number == 0 and grad_x is None:
                    break
                grad = next_u[:, : level.ins]
                if rows:
                    torch.mm(u[:, :rows], plan.matrices[number][:rows, : level.ins], out=grad)
                else:
                    grad.zero_()
                if number == depth and grad_features is not None:
                    grad += grad_features[image, pixels]
                if begins is not None:
                    _add_skip(plan, begins, block_grad, grad, backwards=True)
                if ends is not None:
                    block_tile[:size, : level.ins] = grad
                    h.copy_(summands[ends][image, pixels])
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
                    row_sums = grad.sum(1, dtype=plan.wide)
                    grad_noise[number - 1, image, pixels] = row_sums * plan.gained_strengths[number - 1]
                u, next_u = next_u, u
    if grad_x is not None:
        grad_x = grad_x.to(x.dtype)
    return StackGrads(grad_x, grads.weights, grads.styles, grads.biases, grads.strengths, grad_noise)


# --- modulated weights by themselves --------------------------------------------------------------------------------


@torch.no_grad()
def modulate(weight: Tensor, style: Tensor, *, demodulate: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """`reference.modulate` image by image, so that an image's matrix stays in cache from pass to pass.

    Args:
        weight, style: `[O, I]` and `[B, I]`, float32 or float64.
        demodulate, eps, dtype: as there.

    Returns:
        `[B, O, I]`, contiguous.
    """
    mods = weight.new_empty((style.shape[0], *weight.shape), dtype=dtype)
    scales = row_scales(weight, style, eps)[:, :, None] if demodulate else None
    for image, mod in enumerate(mods):
        v = torch.mul(weight, style[image], out=mod if dtype == weight.dtype else None)
        v.mul_(weight.shape[1] ** -0.5 if scales is None else scales[image])
        if dtype != weight.dtype:
            mod.copy_(v)
    return mods


@torch.no_grad()
def modulate_backward(
    grad: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` `[O, I]` and `style` `[B, I]` from `grad` = dL/dM `[B, O, I]`, all of one dtype; see
    `reference.modulate_backward`."""
    grads = weight.new_empty(weight.shape), style.new_empty(style.shape)
    scales = row_scales(weight, style, eps)[:, :, None] if demodulate else None
    total = MatrixGradient(weight, style, demodulate, *grads)
    for image, n in enumerate(grad):
        total.add(image, n, weight.shape[1] ** -0.5 if scales is None else scales[image])
    return grads
