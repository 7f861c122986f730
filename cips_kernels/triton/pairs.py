"""Which layers run as pairs, and the launch of one."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..spec import StackSpec
from . import config, fusion
from .descriptors import describe, usable

_MOST_CHANNELS = 4  # of a ToRGB: one row sum each in the tail


def find(spec: StackSpec, x: Tensor, mods: list[Tensor], features: Tensor | None, needed: int) -> frozenset[int]:
    """The first layer of each pair among the first `needed` layers of `spec`, by `fusion.current()`.

    Between the two of a pair nothing may read: no ToRGB, no end of a residual block.

    Args:
        x: the stack's input `[B or 1, P, I]`.
        mods: modulated weights, `[B, O, I]` for each layer first.
        features: where the last layer goes, None if nowhere.
    """
    most = fusion.current().pairs
    if not most or spec.blocks or spec.rgb_channels > _MOST_CHANNELS:
        return frozenset()
    found: set[int] = set()
    layer = 0
    while layer + 1 < needed:
        widths = spec.widths[layer : layer + 3]
        # what lies between layers is read and written by the copy engine: rows of whole 16 bytes
        fits = max(widths) <= most and all(width % 8 == 0 for width in widths) and not spec.rgbs_after(layer)
        operands = [*mods[layer : layer + 2], *([x] if layer == 0 else [])]
        if features is not None and layer + 2 == spec.depth:
            operands.append(features)
        if fits and min(widths) >= 32 and usable(*operands) and tile_of(widths, x.device) is not None:
            found.add(layer)
            layer += 1
        layer += 1
    return frozenset(found)


def output_buffers(spec: StackSpec, paired: frozenset[int]) -> list[int]:
    """As `StackSpec.output_buffers`, where the first layer of a pair has no output: its number is the second's, so that a pair
    does not write into what it reads."""
    if not paired:
        return spec.output_buffers()
    buffers: list[int] = []
    for layer in range(spec.depth):
        turns = len(buffers) - sum(first < layer for first in paired)
        buffers.append(turns % 2)
    return buffers


def tile_of(widths: tuple[int, ...], device: torch.device) -> config.PairTile | None:
    """The tile of a pair with `widths` `(I, H, O)`, None where no tile serves it."""
    return fusion.current().pair_tile or config.pair_tile(max(widths), device)


def pair_forward(
    x: Tensor,
    matrices: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    strengths: tuple[Tensor, Tensor],
    noise: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    rgb_m: Tensor | None,
    rgb_part: Tensor | None,
    spec: StackSpec,
) -> None:
    """Two layers into `out` `[B, P, O]` (None: not kept), their ToRGB's one share into `rgb_part` `[1, B, P, C]` (None: none
    reads the second).

    Args:
        x: `[B or 1, P, I]`, half precision, `usable` by descriptors, as all that follows.
        matrices: modulated weights `[B, H, I]` and `[B, O, H]`.
        biases, strengths: float32, `[H]`, `[O]`, and `[]`.
        noise: `[B, P]` float32 of each layer, or None.
        rgb_m: `[B, C, O]`.
    """
    m1, m2 = matrices
    batch, middle, in_features = m1.shape
    pixels, out_features = x.shape[1], m2.shape[1]
    tile = tile_of((in_features, middle, out_features), x.device)
    block_i, block_o = config.next_power_of_2(in_features), config.next_power_of_2(out_features)
    x_desc = describe(x, tile.rows, block_i)
    from .pair import modfc_pair_fwd_kernel

    r = m2 if rgb_m is None else rgb_m
    noise1, noise2 = biases if noise is None else noise
    modfc_pair_fwd_kernel[(batch * triton.cdiv(pixels, tile.rows),)](
        x_desc, int(x.shape[0] > 1), describe(m1, tile.middle, block_i), describe(m2, block_o, tile.middle),
        x_desc if out is None else describe(out, tile.rows, block_o // tile.parts),
        *biases, *strengths, noise1, noise2, 0 if noise is None else noise1.stride(0),
        r, r.stride(0), r.stride(1), biases[0] if rgb_part is None else rgb_part,
        pixels, middle, out_features, spec.negative_slope, spec.gain,
        NOISE=noise is not None, CHANNELS=0 if rgb_m is None else rgb_m.shape[1], STORE=out is not None,
        BLOCK_P=tile.rows, BLOCK_I=block_i, BLOCK_H=tile.middle, BLOCK_O=block_o, PARTS=tile.parts,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
