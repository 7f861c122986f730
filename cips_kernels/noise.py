"""Counter-based Gaussian noise: the same point has the same value in a full image, a tile, a patch, forward and backward.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with

    key     = (low, high) 32 bits of the seed
    counter = (c0, c1, image, layer)

where `(c0, c1)` are the bits of the float32 coordinates `(x, y)` if coordinates are given, otherwise the low and high 32
bits of the pixel's index. The first two output words give one normal value by Box and Muller's transform. The Triton
kernels compute the same words from the same counters, so noise is never stored.

In plain PyTorch a value costs some eighty passes over an int64 word. Counters are therefore broadcast late (the first
rounds depend on the pixel alone or on the layer alone), words are masked only before they are multiplied, and passes
work in place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def _rounds(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first `count` rounds: words 0 and 2 in [0, 2**32), words 1 and 3 with anything above their low 32 bits, and
    word 0 of the next round's key. The words broadcast against each other; the arguments are left as they are."""
    step = torch.arange(count + 1, device=seed.device)
    keys0 = (((seed & _MASK) + _WEYL_A * step) & _MASK).unbind()
    keys1 = ((((seed >> 32) & _MASK) + _WEYL_B * step) & _MASK).unbind()
    for number, (k0, k1) in enumerate(zip(keys0[:-1], keys1[:-1])):
        # int64 products wrap modulo 2**64; what the arithmetic shift and the unmasked c1 and c3 leave above bit 31 goes
        # with the mask
        if number == 0:
            product_a, product_b, c1, c3 = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B, c1 ^ k0, c3 ^ k1
        else:
            product_a, product_b = c0.mul_(_MULTIPLIER_A), c2.mul_(_MULTIPLIER_B)
            c1, c3 = c1.bitwise_xor_(k0), c3.bitwise_xor_(k1)
        c0 = _xor(product_b >> 32, c1).bitwise_and_(_MASK)
        c2 = _xor(product_a >> 32, c3).bitwise_and_(_MASK)
        c1, c3 = product_b, product_a
    return c0, c1, c2, c3, keys0[-1]


def _xor(a: Tensor, b: Tensor) -> Tensor:
    """`a ^ b`, overwriting `a` where it has the shape of the result."""
    if a.shape == b.shape:
        return a.bitwise_xor_(b)
    return a ^ b


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64 tensors in [0, 2**32), of Philox4x32-10 for int64 counters in [0, 2**32), which
    broadcast."""
    c0, c1, c2, c3, _ = _rounds(seed, c0, c1, c2, c3, 10)
    return c0, c1 & _MASK, c2, c3 & _MASK


def pixel_counters(
    pixels: int, coords: Tensor | None, device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Counter words `(c0, c1)`, int64 `[P]` or `[B, P]`: the bits of the coordinates, or the pixel's index counted from
    `first` (where coordinates are given, the caller cuts them)."""
    if coords is None:
        index = torch.arange(first, first + pixels, device=device)
        return index & _MASK, index >> 32
    # adding +0.0 turns -0.0 into +0.0: one point, one noise
    bits = (coords.detach().float() + 0.0).contiguous().view(torch.int32).long() & _MASK
    return bits[..., 0], bits[..., 1]


def normal_at(seed: Tensor, c0: Tensor, c1: Tensor, image: Tensor, layer: Tensor) -> Tensor:
    """Standard normal noise of int64 counters in [0, 2**32), which broadcast; float32 of their common shape."""
    # word 0 after nine rounds and words 2 and 3 after ten are not needed
    _, c1, c2, _, k0 = _rounds(seed, c0, c1, image, layer, 9)
    product = c2 * _MULTIPLIER_B
    r0 = _xor(product >> 32, c1 ^ k0).bitwise_and_(_MASK).bitwise_right_shift_(8).float()
    r1 = product.bitwise_and_(_MASK).bitwise_right_shift_(8).float()
    radius = r0.add_(0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    return r1.mul_(2.0 * math.pi * 2.0**-24).cos_().mul_(radius)


def normal(seed: Tensor, layer: int, batch: int, pixels: int, coords: Tensor | None = None) -> Tensor:
    """Standard normal noise of one layer.

    Args:
        seed: int64 scalar tensor.
        layer: the layer's number in its stack.
        batch, pixels: sizes B and P.
        coords: float32 `[P, 2]` or `[B, P, 2]`, or None to key by the pixel's index.

    Returns:
        float32 `[B, P]` on the seed's device.
    """
    c0, c1 = pixel_counters(pixels, coords, seed.device)
    image = torch.arange(batch, device=seed.device)[:, None]
    return normal_at(seed, c0, c1, image, torch.full_like(image, layer))
