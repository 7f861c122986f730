"""Noise and holes (Karras et al. 2020, "Training GANs with Limited Data", appendix B, "image-space corruptions")."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import axis_shape, happens

NOISE_DEVIATION = 0.1
CUTOUT_SHARE = 1 / 2


def noise(images: Tensor, probability: Tensor) -> Tensor:
    """`[B, C, H, W]` plus white noise, a value a pixel and channel, of a deviation |N(0, 0.1^2)| an image."""
    count = len(images)
    deviation = torch.randn(count, device=images.device).abs() * NOISE_DEVIATION * happens(probability, count)
    return images + torch.randn_like(images) * axis_shape(deviation.to(images.dtype))


def cutout(images: Tensor, probability: Tensor) -> Tensor:
    """`[B, C, H, W]` with zeros in a rectangle of half the sides, whose centre is uniform over the image: it may stick out."""
    count = len(images)
    cut = happens(probability, count)[:, None]
    rows, columns = (
        # distance of each pixel's middle, in sides of the image
        ((torch.arange(side, device=images.device) + 0.5) / side - torch.rand(count, 1, device=images.device)).abs()
        < CUTOUT_SHARE / 2
        for side in images.shape[2:]
    )
    return images * ~((rows & cut)[:, None, :, None] & columns[:, None, None, :])
