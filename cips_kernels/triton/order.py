"""Layers of "sinrelu" with their sums in the order of their outputs.

The activation puts the even channels first. A kernel that did so would scatter its tile; instead the rows of a layer's
weight and its biases are put in that order before they are modulated, and the gradients of both put back. The kernels
then find leaky ReLUs in a layer's first channels and sines in the others, and everything that reads outputs (the next
layer, ToRGBs) is as it was.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..spec import StackGrads, StackInputs, StackSpec


def evens(spec: StackSpec, channels: int) -> int:
    """How many of a layer's `channels` outputs, the first, are leaky ReLUs."""
    return (channels + 1) // 2 if spec.activation == "sinrelu" else 0


@cache  # never dropped: a captured CUDA graph may still read them
def _places(channels: int, back: bool, device: torch.device) -> Tensor:
    """For every output the channel of its sum, even channels first; or, `back`, for every channel its output."""
    forth = torch.cat((torch.arange(0, channels, 2), torch.arange(1, channels, 2)))
    return (torch.argsort(forth) if back else forth).to(device)


def _reordered(weights: Tensor | None, biases: Tensor | None, spec: StackSpec, batch: int, back: bool) -> tuple[Tensor | None, Tensor | None]:
    """Flat weights and biases with the rows of every layer in the other order; what ToRGBs own is as it was."""
    packing = spec.packing(batch)
    out = [None if t is None else torch.empty_like(t) for t in (weights, biases)]
    for t, new, view in ((weights, out[0], packing.weight), (biases, out[1], packing.bias)):
        if t is None or new is None:
            continue
        for layer in packing.layers:
            torch.index_select(view(t, layer), 0, _places(layer.out_features, back, t.device), out=view(new, layer))
        for rgb in packing.rgbs:
            view(new, rgb).copy_(view(t, rgb))
    return out[0], out[1]


def in_order_of_outputs(inputs: StackInputs, spec: StackSpec) -> StackInputs:
    """`inputs` as the kernels take them; without residual blocks."""
    if spec.activation != "sinrelu":
        return inputs
    weights, biases = _reordered(inputs.weights, inputs.biases, spec, inputs.batch, False)
    return inputs._replace(weights=weights, biases=biases)


def in_order_of_sums(grads: StackGrads, spec: StackSpec, batch: int) -> StackGrads:
    """Gradients that the kernels left, as of the weights and biases that the caller has."""
    if spec.activation != "sinrelu":
        return grads
    weights, biases = _reordered(grads.weights, grads.biases, spec, batch, True)
    return grads._replace(weights=weights, biases=biases)
