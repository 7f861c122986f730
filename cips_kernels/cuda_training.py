"""Launcher of the on-chip stack's training kernels (csrc/kernels/stack_train_fwd.cuh, stack_chain.cuh).

The forward keeps every layer's output and a bit an element for its sign; the backward walks the whole chain of gradients
in one launch and leaves the gradient at every layer's sums, from which `cuda_wgrad` makes the weight gradients.

Activations are kept over `g (1 - s)` and gradients over `g`, gain and slope of the layers, and the channels of both lie in
fragment order (csrc/tile/stack_train.h, triton/fragment.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import cuda_onchip, cuda_wgrad
from .cuda import _DTYPES, _load
from .cuda_onchip import Prepared, _stream
from .cuda_saved import CHUNK, UNIT_PIXELS, empty_saved, padded
from .packing import Packing, pack
from .recompute import parts
from .spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, empty_like_layout
from .triton import layers, modulation
from .triton.fragment import to_natural

_ROWS = 1 << 16  # images x pixels whose gradients are held at once: 1 GB of the paper's layers


def forward(inputs: StackInputs, spec: StackSpec, rgb: Tensor) -> StackSaved:
    """The RGB sum of a stack over `inputs.x`, into `rgb` `[B, P, C]`, and what the backward needs."""
    saved = empty_saved(inputs.x, spec, inputs.batch)
    cuda_onchip.forward(inputs, spec, rgb, saved)
    return saved


@lru_cache(maxsize=256)
def _chain_plan(spec: StackSpec, batch: int):  # -> cips_kernels._cuda.ChainPlan
    held = min(spec.widths[0], cuda_onchip.MAX_WIDTH)
    return _load().ChainPlan(cuda_onchip.make_plan(spec, batch, held))


def _prepare(inputs: StackInputs, spec: StackSpec) -> Prepared:
    """Transpose and tile every modulated weight of a call, in one launch."""
    batch, device = inputs.batch, inputs.weights.device
    plan = _chain_plan(spec, batch)
    slabs = torch.empty((batch, plan.slab_bytes), dtype=torch.uint8, device=device)
    records = torch.empty((batch, plan.record_bytes), dtype=torch.uint8, device=device)
    _load().chain_pack(
        plan,
        weights=inputs.weights.data_ptr(),
        styles=inputs.styles.data_ptr(),
        style_stride=inputs.styles.stride(0),
        slabs=slabs.data_ptr(),
        records=records.data_ptr(),
        dtype=_DTYPES[inputs.x.dtype],
        eps=spec.eps,
        gain=spec.gain,
        demodulate=spec.demodulate,
        device=device.index,
        stream=_stream(device),
    )
    return Prepared(plan, slabs, records, None, records, None)


def _runs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, last) of runs of layers that are as wide in and out as one another; layer 0 by itself."""
    runs = [(0, 0)]
    for layer in range(1, len(widths) - 1):
        alike = layer > 1 and widths[layer : layer + 2] == widths[layer - 1 : layer + 1]
        runs = [*runs[:-1], (runs[-1][0], layer)] if alike else [*runs, (layer, layer)]
    return runs


@cache  # never dropped: a captured CUDA graph may still read them
def _rgb_table(spec: StackSpec, batch: int, device: torch.device) -> Tensor:
    """What `layers.rgb_wgrad_chain` must know of each ToRGB of the last layer, whose output no other layer reads."""
    return torch.tensor(
        [
            (sum(spec.widths[1 : after + 1]), m.in_features, m.mod_offset, m.row_stride)
            for after, m in zip(spec.rgb_after, spec.packing(batch).rgbs)
            if after == spec.depth - 1
        ],
        dtype=torch.int64,
        device=device,
    )


@cache  # never dropped, as above
def _bias_places(spec: StackSpec, device: torch.device) -> Tensor:
    """Where the gradient of each bias, in the packing's order, lies in the chain's sums followed by those of the colours."""
    packing = spec.packing(1)
    chunks = sum(-(-matrix.out_features // CHUNK) for matrix in packing.layers)
    lanes = to_natural(torch.arange(chunks * CHUNK).view(-1, CHUNK), 1)
    places = torch.empty(packing.bias_numel, dtype=torch.int64)
    for matrix in packing.layers:
        own, lanes = lanes.split([n := -(-matrix.out_features // CHUNK), len(lanes) - n])
        packing.bias(places, matrix).copy_(own.reshape(-1)[: matrix.out_features])
    for matrix in packing.rgbs:
        packing.bias(places, matrix).copy_(chunks * CHUNK + torch.arange(matrix.out_features))
    return places.to(device)


class _Chain:
    """The state of one backward call."""

    def __init__(
        self, drgb: Tensor, inputs: StackInputs, spec: StackSpec, saved: StackSaved, needs: Needs, tight: bool
    ) -> None:
        self.tight = tight
        self.drgb, self.inputs, self.spec, self.needs = drgb, inputs, spec, needs
        batch, pixels = inputs.batch, inputs.pixels
        self.packing: Packing = spec.packing(batch)
        self.signs = saved.mods
        self.saved = saved
        self.prepared = _prepare(inputs, spec)
        self.device, self.dtype = inputs.x.device, inputs.x.dtype
        self.fold = spec.gain * (1 - spec.negative_slope)  # what kept activations are over
        float32 = {"dtype": torch.float32, "device": self.device}
        # every matrix is written, and what lies between their rows nobody reads
        self.grad_mods = torch.empty(self.packing.mod_numel, **float32) if needs.weights else None
        self.rows = (
            torch.empty((spec.depth, batch, pixels), **float32) if needs.noise and inputs.has_noise else None
        )
        self.bias_parts = None
        if needs.biases:
            warps = _load().chain_warps(_DTYPES[self.dtype], self.device.index)
            self.bias_parts = torch.zeros((warps, self.prepared.plan.image_chunks * CHUNK), **float32)
        self.first = torch.empty((batch, pixels, spec.widths[1]), dtype=self.dtype, device=self.device)
        images, _, count = max(
            ((i, p, c) for _, i, p, c in self._parts()), key=lambda part: part[0] * part[2]
        )
        self.workspace = torch.empty(
            images * count * sum(spec.widths[2:]), dtype=self.dtype, device=self.device
        )
        self.colours = torch.empty(
            images * padded(count) * cuda_wgrad.COLOUR_COLUMNS if needs.weights else 0,
            dtype=self.dtype,
            device=self.device,
        )

    def _parts(self) -> Iterator[tuple[int, int, int, int]]:
        """(first image, images, first pixel, pixels) of each launch."""
        batch, pixels = self.inputs.batch, self.inputs.pixels
        whole = batch * pixels
        # what would fit at once goes in two halves where that saves much, and waves are full all the same; half an image, to
        # be added to the other, costs 3%
        least = _ROWS // 2 if batch > 1 else _ROWS * 3 // 4 if self.tight else _ROWS
        return parts(batch, pixels, padded(whole // 2) if least < whole <= _ROWS else _ROWS)

    def run(self) -> None:
        """Every part's chain, and the weight gradients while its gradients are there."""
        for part in self._parts():
            self._launch(*part)
            if self.grad_mods is not None:
                self._wgrads(*part)

    def _launch(self, image: int, images: int, pixel: int, count: int) -> None:
        batch, pixels = self.inputs.batch, self.inputs.pixels
        signs = self.signs.view(batch, -1)[image]  # where pixels are cut, the part is of one image
        words = signs.numel() // (padded(pixels) // UNIT_PIXELS)  # of a unit's pixels
        _load().chain_backward(
            self.prepared.plan,
            slabs=self.prepared.slabs[image].data_ptr(),
            records=self.prepared.records[image].data_ptr(),
            drgb=self.drgb[image, pixel].data_ptr(),
            signs=signs[pixel // UNIT_PIXELS * words :].data_ptr(),
            first=self.first[image, pixel].data_ptr(),
            u=self.workspace.data_ptr(),
            colours=0 if self.grad_mods is None else self.colours.data_ptr(),
            bias_parts=0 if self.bias_parts is None else self.bias_parts.data_ptr(),
            noise_rows=0 if self.rows is None else self.rows[0, image, pixel].data_ptr(),
            noise_stride=batch * pixels,
            images=images,
            pixels=count,
            dtype=_DTYPES[self.dtype],
            gain=self.spec.gain,
            negative_slope=self.spec.negative_slope,
            device=self.device.index,
            stream=_stream(self.device),
        )

    def _wgrads(self, image: int, images: int, pixel: int, count: int) -> None:
        """Of the part in hand, and of the ToRGBs but the last layer's; of layer 0 by Triton where the copy engine cannot read
        its input."""
        packing, flat, place = self.packing, self.grad_mods, image
        if pixel > 0:  # the rest of an image that is cut: to be added
            packing, place = self.spec.packing(1), 0
            flat = torch.empty(packing.mod_numel, dtype=torch.float32, device=self.device)
        runs = []
        for first, last in _runs(self.spec.widths):
            u, x = self._operands(first, last, image, images, pixel, count)
            scale = self.spec.gain * (self.fold if first else 1.0)
            if cuda_wgrad.usable(x):
                runs.append(cuda_wgrad.Run(first, last, u, x, scale))
                continue
            out = packing.mod(flat, packing.layers[0]).narrow(0, place, images)
            layers.layer_wgrad(u[0], x[0], out, fragment_u=True, scale=scale)
        if runs:
            columns = cuda_wgrad.COLOUR_COLUMNS
            colours = self.colours[: images * padded(count) * columns].view(images, -1, columns)
            cuda_wgrad.wgrad(runs, packing, self.spec, flat, colours, self.fold, place)
        if pixel > 0:
            depth = self.spec.depth
            made = [*range(depth)]
            made += [depth + k for k, after in enumerate(self.spec.rgb_after) if after < depth - 1]
            sums = [self.packing.mod(self.grad_mods, self.packing.matrices[k])[image] for k in made]
            torch._foreach_add_(sums, [packing.mod(flat, packing.matrices[k])[0] for k in made])

    def _operands(
        self, first: int, last: int, image: int, images: int, pixel: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """`u` and `x` `[layers, images or 1, count, width]` of the layers `first .. last`, which are equally wide."""
        widths, batch, pixels = self.spec.widths, self.inputs.batch, self.inputs.pixels
        if first == 0:
            x = self.inputs.x
            u = self.first.narrow(0, image, images)[None]
            x = (x if x.shape[0] == 1 else x.narrow(0, image, images))[None]
            return u.narrow(2, pixel, count), x.narrow(2, pixel, count)
        depth, width = last - first + 1, widths[first + 1]
        rows = images * count
        u = self.workspace.narrow(0, rows * sum(widths[2 : first + 1]), rows * depth * width)
        read = batch * pixels * widths[first]
        x = self.saved.features.narrow(0, batch * pixels * sum(widths[1:first]), depth * read)
        x = x.view(depth, batch, pixels, widths[first]).narrow(1, image, images)
        return u.view(depth, images, count, width), x.narrow(2, pixel, count)

    def rgb_wgrads(self) -> None:
        """Of the last layer's ToRGBs and every image at once."""
        table = _rgb_table(self.spec, self.inputs.batch, self.device)
        layers.rgb_wgrad_chain(
            self.drgb, self.saved.features, table, self.spec.widths[-1], self.grad_mods, self.fold
        )

    def biases(self) -> Tensor:
        """Gradients of all biases, in the packing's order."""
        sums = self.bias_parts.sum(0).mul_(self.spec.gain)
        colours = self.drgb.sum((0, 1), dtype=torch.float32)
        return torch.cat((sums, colours)).index_select(0, _bias_places(self.spec, self.device))

    def noise(self) -> tuple[Tensor, Tensor | None]:
        """Gradients of the strengths, and of given noise."""
        if self.rows is None:
            return torch.zeros(self.spec.depth, dtype=torch.float32, device=self.device), None
        strengths = layers.strength_grads(self.rows, self.inputs, self.spec)
        if self.inputs.noise is None:
            return strengths, None
        return strengths, self.rows.mul_(self.inputs.noise_strengths[:, None, None])

    def x(self, total: Tensor | None) -> Tensor | None:
        """Gradient of the stack's input, in its layout; None where it is added to `total`."""
        x, spec, batch = self.inputs.x, self.spec, self.inputs.batch
        matrix = self.packing.layers[0]
        alone = pack(spec.widths[:2], (), 1, spec.demodulate, batch)
        styles = self.packing.style(self.inputs.styles, matrix).contiguous()
        weights = self.packing.weight(self.inputs.weights, matrix).reshape(-1)
        mods = alone.mod(
            modulation.modulate(weights, styles, alone, torch.float32, spec.eps), alone.layers[0]
        )
        mods = to_natural(mods * spec.gain, 1).to(self.dtype)  # an involution: to fragment order as well
        if total is not None:
            layers.input_dgrad(self.first, mods, None, None, total, batch, add=True)
            return None
        grad = empty_like_layout(x, x.shape[0], x.shape[2], x.dtype)
        layers.input_dgrad(self.first, mods, None, None, grad, batch)
        return grad


def backward(
    grad_rgb: Tensor, inputs: StackInputs, spec: StackSpec, saved: StackSaved, needs: Needs, tight: bool = False,
    total_x: Tensor | None = None,
) -> StackGrads:  # fmt: skip
    """The gradients of a call whose forward was `forward`; tight: of one image in half of the memory. That of `x` is added to
    `total_x` if there is one, and then not returned."""
    chain = _Chain(grad_rgb.contiguous(), inputs, spec, saved, needs, tight)
    chain.run()
    grad_x = chain.x(total_x) if needs.x else None
    del chain.workspace, chain.first, chain.colours
    grad_weights = grad_styles = grad_biases = grad_strengths = grad_noise = None
    if chain.grad_mods is not None:
        chain.rgb_wgrads()
        grad_weights, grad_styles = modulation.modulate_backward(
            chain.grad_mods, inputs.weights, inputs.styles, chain.packing, spec.eps
        )
    if needs.biases:
        grad_biases = chain.biases()
    if needs.noise:
        grad_strengths, grad_noise = chain.noise()
    return StackGrads(grad_x, grad_weights, grad_styles, grad_biases, grad_strengths, grad_noise)
