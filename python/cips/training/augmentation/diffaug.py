"""DiffAugment (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training").

Three kinds of change, each image with random numbers of its own, U = uniform:

    colour        brightness  x + a,                   a ~ U(-0.5, 0.5)
                  saturation  m + (x - m) b,           b ~ U(0, 2), m the mean over the channels of each pixel
                  contrast    M + (x - M) c,           c ~ U(0.5, 1.5), M the mean over the image
    translation   by whole pixels, each side up to an eighth of its length, zeros coming in
    cutout        a rectangle of half the image's sides, its centre anywhere, becomes zero
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Augmentation, axis_shape

KINDS = ("colour", "translation", "cutout")
TRANSLATION_SHARE = 1 / 8
CUTOUT_SHARE = 1 / 2


class DiffAugment(Augmentation):
    """The changes of some kinds, in the order of `KINDS`.

    Args:
        kinds: a choice of `KINDS`.
    """

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        super().__init__()
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)

    def forward(self, images: Tensor) -> Tensor:
        for kind in self.kinds:
            images = _FUNCTIONS[kind](images)
        return images


def colour(images: Tensor) -> Tensor:
    """Brightness, saturation, contrast: three numbers an image, drawn in this order."""
    a, b, c = torch.rand(3, len(images), device=images.device, dtype=images.dtype).unbind()
    images = images + axis_shape(a - 0.5)
    mean = images.mean(1, keepdim=True)
    images = mean + (images - mean) * axis_shape(2 * b)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * axis_shape(c + 0.5)


def translation(images: Tensor) -> Tensor:
    """Moves each image down and to the right by integers that may be negative; rows first."""
    count, _, height, width = images.shape
    device = images.device
    sources, inside = [], []
    for side in (height, width):
        reach = int(side * TRANSLATION_SHARE + 0.5)
        shift = torch.randint(-reach, reach + 1, (count, 1), device=device)
        source = torch.arange(side, device=device) - shift
        inside.append((source >= 0) & (source < side))
        sources.append(source.clamp(0, side - 1))
    rows, columns = sources
    image = torch.arange(count, device=device)
    moved = images[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    # a product and not a choice: what is outside gets no gradient of any order
    return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


def cutout(images: Tensor) -> Tensor:
    """Zeros in a rectangle that begins half of itself before a random pixel: it may stick out."""
    count, _, height, width = images.shape
    hidden = []
    for side in (height, width):
        length = int(side * CUTOUT_SHARE + 0.5)
        # one place more for an even length, whose middle lies between pixels
        first = torch.randint(0, side + (1 - length % 2), (count, 1), device=images.device) - length // 2
        place = torch.arange(side, device=images.device)
        hidden.append((place >= first) & (place < first + length))
    return images * ~(hidden[0][:, None, :, None] & hidden[1][:, None, None, :])


_FUNCTIONS = {"colour": colour, "translation": translation, "cutout": cutout}
