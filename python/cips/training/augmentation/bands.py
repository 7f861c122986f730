"""Stronger and weaker bands of frequencies (Karras et al. 2020, "Training GANs with Limited Data", appendix B).

Four bands, [0, pi/8], [pi/8, pi/4], [pi/4, pi/2] and [pi/2, pi], cut by the wavelet sym2. With H its low-pass filter,
L(z) = H(z) H(1/z) / 2 keeps the lower half of the spectrum and U(z) = L(-z) the upper one, L + U = 1:

    band 1 = L(z) L(z^2) L(z^4),   band 2 = L(z) L(z^2) U(z^4),   band 3 = L(z) U(z^2),   band 4 = U(z)

They add up to 1, so that gains of 1 leave an image as it is. One filter, the sum of the bands times the image's gains, goes along
the rows and along the columns; the image is continued by reflection.

Filter and reflection together are a matrix that the rows, and another that the columns are multiplied by: a product has
derivatives of every order and needs no padding (the filter is longer than small images are).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .base import happens
from .warp import mirrored

SYM2 = tuple((a + b * math.sqrt(3)) / (4 * math.sqrt(2)) for a, b in ((1, -1), (3, -1), (3, 1), (1, 1)))
"""Daubechies' scaling filter with two vanishing moments: squares add up to 1, values to sqrt(2)."""

POWER = tuple(part / 13 for part in (10, 1, 1, 1))
"""Share of each band in the power of a natural image, whose spectrum falls as 1/f."""

DEVIATION = 1.0  # of the binary logarithm of a gain


class Bands(nn.Module):
    """Multiplies the bands of each image by gains of its own."""

    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.from_numpy(filter_bank()), persistent=False)

    def forward(self, images: Tensor, gains: Tensor) -> Tensor:
        """`images` float `[B, C, H, W]`, sides of at least 2, and `gains` `[B, 4]`, the lowest band first -> `[B, C, H, W]`."""
        rows, columns = (self._matrices(side, gains.to(images.dtype)) for side in images.shape[2:])
        return rows @ images @ columns.mT

    def _matrices(self, side: int, gains: Tensor) -> Tensor:
        """`[B, 1, side, side]`, from a line of an image to the same line filtered."""
        taps = self.taps.to(gains.dtype)
        count, length = taps.shape
        place = torch.arange(side, device=taps.device)[:, None] + torch.arange(length, device=taps.device) - length // 2
        bands = taps.new_zeros(count, side, side)
        bands.scatter_add_(2, mirrored(place, side).expand(count, -1, -1), taps[:, None].expand(-1, side, -1))
        return (gains @ bands.flatten(1)).view(-1, 1, side, side)


def filter_bank() -> np.ndarray:
    """The four bands' filters, each symmetric about its middle: float64 `[4, 43]`."""
    low = np.convolve(SYM2, SYM2[::-1]) / 2
    high = low * (-1.0) ** (np.arange(len(low)) - len(low) // 2)

    def stretched(taps: np.ndarray, times: int) -> np.ndarray:
        """z -> z^times."""
        wide = np.zeros(times * (len(taps) - 1) + 1)
        wide[::times] = taps
        return wide

    lower, found = np.ones(1), []
    for times in (1, 2, 4):
        found.append(np.convolve(lower, stretched(high, times)))
        lower = np.convolve(lower, stretched(low, times))
    found.append(lower)
    return np.stack([np.pad(taps, (len(lower) - len(taps)) // 2) for taps in reversed(found)])


def band_gains(probability: Tensor, count: int) -> Tensor:
    """Gains `[count, 4]`: each band's, with `probability`, 2^N(0, 1), after which all four are scaled so that an image with
    the spectrum of natural ones keeps its power.
    """
    device = probability.device
    power = torch.full((len(POWER),), POWER[-1], device=device)
    power[0].fill_(POWER[0])  # a tensor made of four numbers would wait for the GPU
    gains = torch.ones(count, len(POWER), device=device)
    for band in range(len(POWER)):
        gain = torch.exp2(torch.randn(count, device=device) * DEVIATION * happens(probability, count))
        one = torch.ones_like(gains)
        one[:, band] = gain
        gains = gains * one / (one.square() @ power).sqrt()[:, None]
    return gains
