"""The call that every backend serves: one stack of modulated layers with its ToRGBs, as flat tensors and plain numbers.

A single layer is a stack of depth one without ToRGB; a single ToRGB is a stack of depth zero whose ToRGB reads after
layer -1, the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import Packing, pack

SQRT_HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class StackSpec:
    """What is constant over a stack (DESIGN section 2; CIPS section 3).

    Attributes:
        widths: `(I_0, O_0, ..., O_{L-1})`.
        rgb_after: layer after which each ToRGB reads, `-1` for the input.
        rgb_channels: channels of each ToRGB.
        demodulate: divide each row of the modulated weight by its norm.
        negative_slope: of the leaky ReLU; 1 is a linear layer.
        gain: factor after the activation.
        eps: added to the squared norm.
        first_layer: number of layer 0 in the noise's counter.
        blocks: (first, last) layer of each residual block, in order and apart: the block's output, which the next layer
            and the ToRGBs after `last` read, is `(y_last + skip(x_first)) / sqrt(2)`. The skip is the identity where
            both are as wide, otherwise a matrix among the weights.
        activation: "lrelu", or "sin" or "sinrelu" (see `activations`).
    """

    widths: tuple[int, ...]
    rgb_after: tuple[int, ...]
    rgb_channels: int = 3
    demodulate: bool = True
    negative_slope: float = 0.2
    gain: float = 2**0.5
    eps: float = 1e-8
    first_layer: int = 0
    blocks: tuple[tuple[int, int], ...] = ()
    activation: str = "lrelu"

    @property
    def depth(self) -> int:
        """Number of modulated layers L."""
        return len(self.widths) - 1

    def packing(self, batch: int) -> Packing:
        """Offsets of every matrix for `batch` images."""
        return pack(self.widths, self.rgb_after, self.rgb_channels, self.demodulate, batch, self.blocks)

    @property
    def saved(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Widths and blocks as which `packing` lays out what a forward saves. A leaky ReLU's backward reads signs off
        outputs; a sine's reads the sums y of every layer, the last included, and makes outputs and blocks of them. Whoever
        keeps sums for its own backward orders their channels as it likes."""
        return (self.widths, self.blocks) if self.activation == "lrelu" else ((*self.widths, 0), ())

    def rgbs_after(self, layer: int) -> list[int]:
        """Indices of the ToRGBs that read after `layer`."""
        return [k for k, after in enumerate(self.rgb_after) if after == layer]

    def block_from(self, layer: int) -> int | None:
        """Index of the residual block that begins with `layer`, or None."""
        return next((k for k, (first, _) in enumerate(self.blocks) if first == layer), None)

    def block_to(self, layer: int) -> int | None:
        """Index of the residual block that ends with `layer`, or None."""
        return next((k for k, (_, last) in enumerate(self.blocks) if last == layer), None)

    def gain_of(self, layer: int) -> float:
        """`gain`, and a block's `1 / sqrt(2)` with it for its last layer: `g lrelu` of any positive g is a gain too."""
        return self.gain if self.block_to(layer) is None else self.gain * SQRT_HALF

    def output_buffers(self) -> list[int]:
        """For each layer the number of the buffer that its output may lie in, where nothing is kept: not the one that
        it reads, nor the one that holds the input of a block that goes on. Two are enough without blocks, three with
        them."""
        buffers: list[int] = []
        for layer in range(self.depth):
            held = [first for first, last in self.blocks if first < layer <= last]
            busy = {buffers[source - 1] for source in (layer, *held) if source > 0}
            buffers.append(min({0, 1, 2} - busy))
        return buffers


class StackInputs(NamedTuple):
    """The tensors of a call; parameters are float32 (float64 where `x` is).

    Attributes:
        x: `[B or 1, P, I_0]`, any strides; batch 1 is shared by all images.
        weights: flat, see packing; skips of residual blocks come last.
        styles: `[B, S]`; with `blend` `[B, K, S]`.
        biases: flat.
        noise_strengths: `[L]`.
        skip: `[B, P, C]` added to the RGB sum, or None.
        seed: int64 scalar for counter noise, or None.
        noise: `[L, B, P]` given noise, or None. At most one of `seed` and `noise` is set.
        coords: float32 `[P, 2]` or `[B, P, 2]`, or None.
        blend: weights `[P, K]` or `[B, P, K]`, in the dtype of the parameters, of the K styles at each pixel, whose
            style is `sum_k blend_pk styles_k`; None: one style an image.
    """

    x: Tensor
    weights: Tensor
    styles: Tensor
    biases: Tensor
    noise_strengths: Tensor
    skip: Tensor | None
    seed: Tensor | None
    noise: Tensor | None
    coords: Tensor | None
    blend: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.styles.shape[0]

    @property
    def pixels(self) -> int:
        return self.x.shape[1]

    @property
    def has_noise(self) -> bool:
        return self.seed is not None or self.noise is not None

    def cut(self, first: int, count: int) -> StackInputs:
        """The call on pixels `first .. first + count - 1`; noise keyed by index is for the caller to count on."""

        def narrow(t: Tensor | None, dim: int) -> Tensor | None:
            return None if t is None else t.narrow(dim, first, count)

        return self._replace(
            x=narrow(self.x, 1),
            skip=narrow(self.skip, 1),
            noise=narrow(self.noise, 2),
            coords=narrow(self.coords, -2),
            blend=narrow(self.blend, -2),
        )


class StackSaved(NamedTuple):
    """What the forward keeps for the backward: last features, earlier layers' outputs (every layer's sums y where the
    activation is a sine), modulated weights. On chip it keeps something else, see `cuda_saved.empty_saved`."""

    features: Tensor
    activations: Tensor
    mods: Tensor


class StackGrads(NamedTuple):
    """Gradients in the order of StackInputs; an input that needs none has None."""

    x: Tensor | None
    weights: Tensor | None
    styles: Tensor | None
    biases: Tensor | None
    noise_strengths: Tensor | None
    noise: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for. Weights and styles come from one sum over pixels, so they share a flag."""

    x: bool
    weights: bool
    biases: bool
    noise: bool


def is_channel_major(x: Tensor) -> bool:
    """Whether `x` `[B, P, C]` lies in memory as `[B, C, P]` (a contiguous `[B, C, H, W]` seen pixel-major)."""
    return x.stride(2) != 1 and x.stride(1) == 1


def empty_like_layout(x: Tensor, batch: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised `[B, P, channels]` in the memory order of `x`."""
    pixels = x.shape[1]
    if is_channel_major(x):
        return x.new_empty((batch, channels, pixels), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, pixels, channels), dtype=dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32: parameters, sums over pixels, and RGB."""
    return torch.float64 if dtype == torch.float64 else torch.float32
