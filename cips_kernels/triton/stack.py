"""The `triton` backend: the stack layer by layer, each layer's whole tail fused into its product.

Where the activation is a sine a forward that saves keeps sums instead of outputs, and a layer's output, which the gradient
of the next one's weight reads, is made of its sums in the backward: one more write there instead of one more activation
kept. Sines in residual blocks are not served.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..packing import Skip, activation, empty_activations, summand
from ..spec import SQRT_HALF, Needs, StackGrads, StackInputs, StackSaved, StackSpec, empty_like_layout
from . import layers, modulation, order, residual
from .layers import noise_values
from .modulation import modulate, modulate_backward

__all__ = ["backward", "forward", "modulate", "modulate_backward", "noise_values"]

# Rows (images x pixels) of one pass of inference: what lies between two layers is then at most 1 GB at width 512 in
# bfloat16, whatever the image's size.
_CHUNK_ROWS = 1 << 20


def _rgb_matrix(spec: StackSpec, layer: int, mods: list[Tensor]) -> Tensor | None:
    """The ToRGB that reads after `layer`; several that read the same features are one, their sum."""
    matrices = [mods[spec.depth + k] for k in spec.rgbs_after(layer)]
    if len(matrices) < 2:
        return matrices[0] if matrices else None
    return torch.stack(matrices).sum(0)


def _skip_weight(inputs: StackInputs, spec: StackSpec, block: int) -> Tensor | None:
    """`[O, I]` of a residual block's skip, None where it is the identity."""
    packing = spec.packing(inputs.batch)
    skip = packing.skips[block]
    return None if skip is None else packing.weight(inputs.weights, skip)


def _summands(flat: Tensor, inputs: StackInputs, spec: StackSpec) -> list[Tensor]:
    """What each block's last layer gave before the addition, `[B, P, O]`, over `sqrt(2)`: only its sign is read."""
    sizes = (spec.widths, inputs.batch, inputs.pixels, spec.blocks)
    return [summand(flat, *sizes, block) for block in range(len(spec.blocks))]


def _last_needed(spec: StackSpec, keep: bool) -> int:
    """How many layers must run: all where the features are kept, otherwise up to the last that a ToRGB reads."""
    return spec.depth if keep else max(spec.rgb_after, default=-1) + 1


def _run_layers(
    inputs: StackInputs,
    spec: StackSpec,
    mods: list[Tensor],
    outputs: list[Tensor | None],
    rgb: Tensor,
    first_pixel: int,
    summands: list[Tensor] | None = None,
    sums: list[Tensor] | None = None,
) -> None:
    """Every layer of one chunk of pixels; `outputs[l]` is where layer l goes, None where nothing reads it again.
    `summands`, and where the activation is a sine `sums`, are kept for the backward; without it a block's output takes
    the memory of its last layer's."""
    packing, batch, pixels = spec.packing(inputs.batch), inputs.batch, inputs.pixels
    noise = layers.noise_values(inputs, spec, first_pixel)
    readers = sorted(set(spec.rgb_after))
    ends = {last: block for block, (_, last) in enumerate(spec.blocks)}
    at_end = replace(spec, gain=spec.gain * SQRT_HALF) if ends else spec
    counts = [1 if layer in ends else layers.shares(spec, layer, inputs.x) for layer in readers]
    shape = (sum(counts), batch, pixels, spec.rgb_channels)
    every = torch.empty(shape, dtype=torch.float32, device=rgb.device)
    shares = dict(zip(readers, every.split(counts)))
    x = inputs.x
    if -1 in shares:
        layers.rgb_forward(x, _rgb_matrix(spec, -1, mods), shares[-1][0])
    for layer, out in enumerate(outputs):
        block = ends.get(layer)
        layers.layer_forward(
            x,
            mods[layer],
            packing.bias(inputs.biases, packing.layers[layer]),
            inputs.noise_strengths[layer],
            None if noise is None else noise[layer],
            out if block is None or summands is None else summands[block],
            _rgb_matrix(spec, layer, mods) if block is None else None,
            shares.get(layer) if block is None else None,
            spec if block is None else at_end,
            None if sums is None else sums[layer],
        )
        if block is not None:
            first = spec.blocks[block][0]
            source = outputs[first - 1] if first else inputs.x
            y = out if summands is None else summands[block]
            residual.add_skip(y, source, _skip_weight(inputs, spec, block), packing.skips[block], out)
            if layer in shares:
                layers.rgb_forward(out, _rgb_matrix(spec, layer, mods), shares[layer][0])
        x = out
    if readers:
        biases = inputs.biases.narrow(0, packing.rgbs[0].bias_offset, len(spec.rgb_after) * spec.rgb_channels)
        layers.rgb_sum(every, biases, len(spec.rgb_after), inputs.skip, rgb)


def _passing(inputs: StackInputs, spec: StackSpec) -> list[Tensor]:
    """Where the outputs of all layers but the last lie until the next has read them, `[B, P, O]` each."""
    rows, widths = inputs.batch * inputs.pixels, spec.widths[1:-1]
    numbers = spec.output_buffers()
    buffers = [inputs.x.new_empty(rows * max(widths, default=0)) for _ in range(max(numbers[:-1], default=-1) + 1)]
    return [
        buffers[number].narrow(0, 0, rows * width).view(inputs.batch, inputs.pixels, width)
        for number, width in zip(numbers, widths)
    ]


def forward(
    inputs: StackInputs, spec: StackSpec, want_features: bool, save: bool, modulation: ModuleType = modulation
) -> tuple[Tensor, Tensor, StackSaved]:
    """Serve a forward call; `modulation` makes the modulated weights (this backend's or the `cuda` one's)."""
    inputs = order.in_order_of_outputs(inputs, spec)
    x, batch, pixels = inputs.x, inputs.batch, inputs.pixels
    packing = spec.packing(batch)
    flat_mods = modulation.modulate(inputs.weights, inputs.styles, packing, x.dtype, spec.eps)
    mods = [packing.mod(flat_mods, matrix) for matrix in packing.matrices]
    rgb = empty_like_layout(x, batch, spec.rgb_channels if spec.rgb_after else 0, torch.float32)
    keep = spec.depth > 0 and (want_features or save)
    features = empty_like_layout(x, batch, spec.widths[-1], x.dtype) if keep else x.new_empty(0)
    if save:
        widths, blocks = spec.saved
        activations = empty_activations(x, widths, batch, pixels, blocks)
        kept = [activation(activations, widths, batch, pixels, i) for i in range(len(widths) - 2)]
        outputs, sums = (kept, None) if spec.activation == "lrelu" else (_passing(inputs, spec), kept)
        outputs = [*outputs, features] if spec.depth else []
        _run_layers(inputs, spec, mods, outputs, rgb, 0, _summands(activations, inputs, spec), sums)
        return features, rgb, StackSaved(features, activations, flat_mods)
    count = max(1, _CHUNK_ROWS // batch)
    # the output of a block that ends the stack has to be somewhere, though nothing but a ToRGB reads it
    kept_in_scratch = spec.widths[1:] if spec.block_to(spec.depth - 1) is not None and not keep else spec.widths[1:-1]
    numbers = spec.output_buffers()
    scratch = [
        x.new_empty(batch * min(count, pixels) * max(kept_in_scratch, default=0))
        for _ in range(max(numbers, default=0) + 1)
    ]
    for first in range(0, pixels, count):
        size = min(count, pixels - first)
        outputs = [
            scratch[numbers[i]].narrow(0, 0, batch * size * width).view(batch, size, width)
            for i, width in enumerate(kept_in_scratch)
        ]
        if spec.depth > len(outputs):
            outputs.append(features.narrow(1, first, size) if keep else None)
        outputs = outputs[: _last_needed(spec, keep)]
        _run_layers(inputs.cut(first, size), spec, mods, outputs, rgb.narrow(1, first, size), first)
    return features, rgb, StackSaved(features, x.new_empty(0), x.new_empty(0))


class _Backward:
    """The state of one backward call: gradients as they fill, and the parts of the layer in hand."""

    def __init__(self, inputs: StackInputs, spec: StackSpec, needs: Needs, mods: list[Tensor], drgb: Tensor | None) -> None:
        self.inputs, self.spec, self.needs, self.mods, self.drgb = inputs, spec, needs, mods, drgb
        self.packing = spec.packing(inputs.batch)
        options = {"dtype": torch.float32, "device": inputs.x.device}
        self.biases = torch.zeros(self.packing.bias_numel, **options)
        self.strengths = torch.zeros(spec.depth, **options)
        # what no layer reaches (a ToRGB without a gradient, padding) stays zero
        self.grad_mods = torch.zeros(self.packing.mod_numel, **options) if needs.weights else None
        self.summands: list[Tensor] = []
        self.grad_skips: dict[Skip, Tensor] = {}
        self.at_end = replace(spec, gain=spec.gain * SQRT_HALF) if spec.blocks else spec
        self.block_grad: Tensor | None = None  # that of the output of the block that the chain is in
        given = inputs.noise
        self.noise = layers.noise_values(inputs, spec, 0) if needs.noise else None
        self.grad_noise = None if given is None else torch.empty(given.shape, dtype=torch.float32, device=given.device)

    def rgb_matrix(self, layer: int) -> Tensor | None:
        return None if self.drgb is None else _rgb_matrix(self.spec, layer, self.mods)

    @property
    def wants_parts(self) -> bool:
        return self.needs.biases or self.needs.noise

    def collect(self, act: Tensor, parts: layers.Parts | None, layer: int) -> None:
        """What the gradients of `layer`'s bias, noise and ToRGB need, once its `u` is known; `act` is its output."""
        if parts is not None:
            torch.sum(parts.bias, 0, out=self.packing.bias(self.biases, self.packing.layers[layer]))
            if self.noise is not None:
                grad = None if self.grad_noise is None else self.grad_noise[layer]
                strength = self.inputs.noise_strengths[layer]
                torch.sum(layers.noise_grads(parts.rows, strength, self.noise[layer], grad), 0, out=self.strengths[layer])
        self.rgb_wgrad(act, layer)

    def skip(self, block: int) -> tuple[Tensor | None, Skip | None]:
        """A block's matrix and where it lies, None for both where the skip is the identity."""
        return _skip_weight(self.inputs, self.spec, block), self.packing.skips[block]

    def activate(self, h: Tensor, act: Tensor, layer: int) -> tuple[Tensor, layers.Parts | None]:
        """`u` of `layer` and its parts, from the gradient `h` of what is read after it, `act`: its output, or that
        of its block."""
        block = self.spec.block_to(layer)
        if block is None:
            return layers.head(h, act, None, None, self.wants_parts, self.spec)
        self.block_grad = h
        return layers.head(h, self.summands[block], None, None, self.wants_parts, self.at_end)

    def leave_block(self, h: Tensor | None, x: Tensor, block: int) -> None:
        """Add the skip's share to the gradient `h` of a block's input `x`, if wanted; and its matrix's own gradient."""
        weight, skip = self.skip(block)
        if h is not None:
            residual.add_skip_grad(h, self.block_grad, weight, skip)
        if self.needs.weights and skip is not None:
            self.grad_skips[skip] = residual.skip_wgrad(self.block_grad, x, skip)

    def rgb_wgrad(self, act: Tensor, layer: int) -> None:
        """N of the ToRGBs that read after `layer`: the same for each."""
        if self.grad_mods is not None and self.drgb is not None and self.spec.rgbs_after(layer):
            n = layers.rgb_wgrad(self.drgb, act)
            for k in self.spec.rgbs_after(layer):
                self.packing.mod(self.grad_mods, self.packing.rgbs[k]).copy_(n)

    def wgrad(self, u: Tensor, x: Tensor, layer: int) -> None:
        if self.grad_mods is not None:
            layers.layer_wgrad(u, x, self.packing.mod(self.grad_mods, self.packing.layers[layer]))


def _chain_of_sines(state: _Backward, grad_features: Tensor | None, features: Tensor, sums: list[Tensor]) -> Tensor:
    """`u` of layer 0, from the last down, where the activation is a sine; all layers' gradients but its weight's on the
    way. `sums` of every layer."""
    spec, wanted = state.spec, state.wants_parts
    last = spec.depth - 1
    u, parts = layers.head(grad_features, sums[last], state.drgb, state.rgb_matrix(last), wanted, spec)
    state.collect(features, parts, last)
    for layer in range(last, 0, -1):
        y = sums[layer - 1]
        made = torch.empty_like(y) if state.needs.weights else None
        below, parts = layers.layer_dgrad(
            u, state.mods[layer], y, state.drgb, state.rgb_matrix(layer - 1), wanted, spec, made
        )
        if made is not None:
            state.wgrad(u, made, layer)
        state.collect(made, parts, layer - 1)
        u = below
    return u


def backward(
    grad_features: Tensor | None,
    grad_rgb: Tensor | None,
    inputs: StackInputs,
    spec: StackSpec,
    saved: StackSaved,
    needs: Needs,
    modulation: ModuleType = modulation,
) -> StackGrads:
    """Serve a backward call: the chain from the last layer down, each layer's weight gradient on the way."""
    inputs = order.in_order_of_outputs(inputs, spec)
    x, batch, pixels = inputs.x, inputs.batch, inputs.pixels
    packing = spec.packing(batch)
    mods = [packing.mod(saved.mods, matrix) for matrix in packing.matrices]
    drgb = grad_rgb.contiguous() if grad_rgb is not None and spec.rgb_after else None
    state = _Backward(inputs, spec, needs, mods, drgb)
    state.summands = _summands(saved.activations, inputs, spec)
    widths, _ = spec.saved
    acts = [activation(saved.activations, widths, batch, pixels, i) for i in range(len(widths) - 2)]
    u = None
    if spec.depth and spec.activation != "lrelu":
        u = _chain_of_sines(state, grad_features, saved.features, acts)
    elif spec.depth:
        last = spec.depth - 1
        rgb_m = state.rgb_matrix(last)
        if spec.block_to(last) is None:
            u, parts = layers.head(grad_features, saved.features, drgb, rgb_m, state.wants_parts, spec)
        else:
            h = residual.output_grad(None, None, drgb, rgb_m, grad_features, saved.features)
            u, parts = state.activate(h, saved.features, last)
        state.collect(saved.features, parts, last)
    for layer in range(spec.depth - 1 if spec.activation == "lrelu" else 0, 0, -1):
        act = acts[layer - 1]
        state.wgrad(u, act, layer)
        rgb_m, begins = state.rgb_matrix(layer - 1), spec.block_from(layer)
        if begins is None and spec.block_to(layer - 1) is None:
            u, parts = layers.layer_dgrad(u, mods[layer], act, drgb, rgb_m, state.wants_parts, spec)
        else:
            h = residual.output_grad(u, mods[layer], drgb, rgb_m, None, act)
            if begins is not None:
                state.leave_block(h, act, begins)
            u, parts = state.activate(h, act, layer - 1)
        state.collect(act, parts, layer - 1)
    if u is not None:
        state.wgrad(u, x, 0)
    direct = state.rgb_matrix(-1)
    if direct is not None:
        state.rgb_wgrad(x, -1)
    grad_x = None
    if needs.x:
        grad_x = empty_like_layout(x, x.shape[0], x.shape[2], x.dtype)
        if u is None and direct is None:
            grad_x.zero_()
        else:
            layers.input_dgrad(u, mods[0] if u is not None else None, drgb, direct, grad_x, batch)
    begins = spec.block_from(0)
    if begins is not None:
        state.leave_block(grad_x, x, begins)
    if drgb is not None:
        sums = drgb.sum((0, 1), dtype=torch.float32)
        for matrix in packing.rgbs:
            packing.bias(state.biases, matrix).copy_(sums)
    grad_weights = grad_styles = None
    if state.grad_mods is not None:
        grad_weights, grad_styles = modulation.modulate_backward(
            state.grad_mods, inputs.weights, inputs.styles, packing, spec.eps
        )
        for skip, grad in state.grad_skips.items():
            packing.weight(grad_weights, skip).copy_(grad)
    grads = StackGrads(grad_x, grad_weights, grad_styles, state.biases, state.strengths, state.grad_noise)
    return order.in_order_of_sums(grads, spec, batch)
