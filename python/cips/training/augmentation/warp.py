"""Affine changes of images without aliasing (Karras et al. 2020, "Training GANs with Limited Data", appendix B).

An image is continued by reflection, brought to twice its resolution by the low-pass filter of the wavelet sym6, read there
bilinearly at the points where the output's pixels come from, also at twice the resolution, and brought back by the same
filter. Since the wavelet is orthogonal, the identity gives the image back. (Beyond a margin around the image it is the finer
image that is mirrored, so that memory does not depend on how far the pixels move.)

`blit` is for changes that need no filter: the paper sends those through the same warp, here they are exact.

PyTorch's `grid_sample` has no second derivative (pytorch#34704), which an R1 penalty through an augmentation needs; here
the reading is a gather and a weighted sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""Daubechies' least asymmetric scaling filter with six vanishing moments: squares add up to 1, values to sqrt(2)."""

CENTRE = sum(k * h for k, h in enumerate(SYM6)) / sum(SYM6)  # where the filter delays a signal to
MARGIN = 3  # pixels beyond the border that are there as such: as far as the filter reaches
PADDING = MARGIN + 3  # and what the filter needs to make them


class Warp(nn.Module):
    """Moves the pixels of each image by an affine map of its own."""

    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.tensor(SYM6, dtype=torch.float64), persistent=False)

    def forward(self, images: Tensor, inverse: Tensor) -> Tensor:
        """Args:
            images: float `[B, C, H, W]`, sides of at least 8.
            inverse: `[B, 2, 3]`, from a point (x, y, 1) of the output to the (x, y) of the input that is seen there; in
                pixels, x to the right, y down, from the middle of the image.

        Returns:
            `[B, C, H, W]`.
        """
        height, width = images.shape[2:]
        fine = self._finer(F.pad(images, (PADDING,) * 4, mode="reflect"))
        x, y = (self._places(count, images) for count in (width, height))
        points = inverse.to(images.dtype)
        along_x = points[:, 0, 0, None] * (x - (width - 1) / 2) + points[:, 0, 2, None]
        along_y = points[:, 1, 0, None] * (x - (width - 1) / 2) + points[:, 1, 2, None]
        down = y - (height - 1) / 2
        source_x = along_x[:, None, :] + points[:, 0, 1, None, None] * down[:, None] + (width - 1) / 2
        source_y = along_y[:, None, :] + points[:, 1, 1, None, None] * down[:, None] + (height - 1) / 2
        # from pixels to entries of the finer image
        columns = 2 * (reflected(source_x, width) + PADDING) + CENTRE
        rows = 2 * (reflected(source_y, height) + PADDING) + CENTRE
        return self._coarser(bilinear(fine, rows, columns))

    def _places(self, count: int, images: Tensor) -> Tensor:
        """Where, in pixels, the finer output lies of which the filter makes `count` pixels."""
        entries = torch.arange(2 * (count - 1) + len(SYM6), device=images.device, dtype=images.dtype)
        return (entries - CENTRE) / 2

    def _finer(self, images: Tensor) -> Tensor:
        taps, (count, channels) = self.taps.to(images.dtype), images.shape[:2]
        flat = images.reshape(-1, 1, *images.shape[2:])
        flat = F.conv_transpose2d(flat, taps.view(1, 1, 1, -1), stride=(1, 2))
        return F.conv_transpose2d(flat, taps.view(1, 1, -1, 1), stride=(2, 1)).unflatten(0, (count, channels))[:, :, 0]

    def _coarser(self, images: Tensor) -> Tensor:
        taps, (count, channels) = self.taps.to(images.dtype), images.shape[:2]
        flat = images.reshape(-1, 1, *images.shape[2:])
        flat = F.conv2d(flat, taps.view(1, 1, 1, -1), stride=(1, 2))
        return F.conv2d(flat, taps.view(1, 1, -1, 1), stride=(2, 1)).unflatten(0, (count, channels))[:, :, 0]


def blit(images: Tensor, inverse: Tensor) -> Tensor:
    """Moves pixels to other pixels, none of them changed: mirrors, quarter turns, whole steps.

    Args:
        images: `[B, C, H, W]`.
        inverse: as in `Warp`; where a point falls between pixels the nearer is taken.

    Returns:
        `[B, C, H, W]`; what comes in from outside is mirrored.
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    columns, rows = (
        inverse[:, axis, 0, None, None] * x + inverse[:, axis, 1, None, None] * y + inverse[:, axis, 2, None, None]
        for axis in (0, 1)
    )
    rows, columns = (
        mirrored((source + (count - 1) / 2).round().long(), count) for source, count in ((rows, height), (columns, width))
    )
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return images[image, :, rows, columns].permute(0, 3, 1, 2)


def mirrored(position: Tensor, count: int) -> Tensor:
    """Positions on a line brought into 0..count-1 as in mirrors at the first and last pixel."""
    period = 2 * (count - 1)
    inside = torch.remainder(position, period)
    return torch.minimum(inside, period - inside)


def reflected(position: Tensor, count: int) -> Tensor:
    """The same for those beyond the margin around 0..count-1 alone."""
    near = (position >= -MARGIN) & (position <= count - 1 + MARGIN)
    return torch.where(near, position, mirrored(position, count))


def bilinear(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[B, C, H, W]` read at fractional rows and columns `[B, h, w]`, clamped to the border: `[B, C, h, w]`.

    Differentiable any number of times in the images; rows and columns get no gradient.
    """
    height, width = images.shape[2:]
    shape = rows.shape[1:]
    with torch.no_grad():
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        top, left = rows.floor(), columns.floor()
        down, right = (rows - top)[:, None], (columns - left)[:, None]
        top, left = top.long(), left.long()
        below, beside = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    flat = images.flatten(2)

    def read(row: Tensor, column: Tensor) -> Tensor:
        index = (row * width + column).flatten(1)[:, None].expand(-1, flat.shape[1], -1)
        return flat.gather(2, index).unflatten(2, shape)

    upper = read(top, left) * (1 - right) + read(top, beside) * right
    lower = read(below, left) * (1 - right) + read(below, beside) * right
    return upper * (1 - down) + lower * down
