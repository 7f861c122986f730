"""A stack as a chain of shorter ones: what lies between them is all that a backward then finds kept."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .spec import StackInputs, StackSpec


def bounds(spec: StackSpec) -> list[tuple[int, int]]:
    """(first layer, layer after the last) of each segment: about the square root of the depth, no residual block cut."""
    step = max(1, round(math.sqrt(spec.depth)))
    ends = [
        end
        for end in range(step, spec.depth, step)
        if not any(first < end <= last for first, last in spec.blocks)
    ]
    return list(zip([0, *ends], [*ends, spec.depth]))


def segment(inputs: StackInputs, spec: StackSpec, begin: int, end: int) -> tuple[StackInputs, StackSpec]:
    """The layers `begin .. end - 1` of a call with the ToRGBs that read after them (those that read the input: the first
    segment's); `x` and `skip` are the whole call's, to be replaced."""
    packing = spec.packing(inputs.batch)
    rgbs = [k for k, after in enumerate(spec.rgb_after) if begin <= after < end or (after < 0 and begin == 0)]
    blocks = [k for k, (first, _) in enumerate(spec.blocks) if begin <= first < end]
    matrices = [*packing.layers[begin:end], *(packing.rgbs[k] for k in rgbs)]
    skips = [packing.skips[k] for k in blocks if packing.skips[k] is not None]

    def weight(m) -> Tensor:
        return inputs.weights.narrow(0, m.weight_offset, m.out_features * m.in_features)

    part = inputs._replace(
        weights=torch.cat([weight(m) for m in (*matrices, *skips)]),
        styles=torch.cat([packing.style(inputs.styles, m) for m in matrices], -1),
        biases=torch.cat([packing.bias(inputs.biases, m) for m in matrices]),
        noise_strengths=inputs.noise_strengths[begin:end],
        noise=None if inputs.noise is None else inputs.noise[begin:end],
    )
    return part, replace(
        spec,
        widths=spec.widths[begin : end + 1],
        rgb_after=tuple(max(-1, spec.rgb_after[k] - begin) for k in rgbs),
        first_layer=spec.first_layer + begin,
        blocks=tuple((first - begin, last - begin) for first, last in (spec.blocks[k] for k in blocks)),
    )
