"""What an augmentation is: a random change of the images that the discriminator sees, real and generated alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Augmentation(nn.Module):
    """The identity, and the interface of the others.

    An augmentation is differentiable twice: the generator learns through it, and so does the R1 penalty, which is taken
    with respect to the images before it. Its random numbers come from torch's global generator of the device, so that they
    are part of a saved state; the host never waits for the device. Buffers are part of a saved state too.
    """

    def forward(self, images: Tensor) -> Tensor:
        """float `[B, 3, H, W]` -> the same shape, dtype and device, each image changed in a way of its own."""
        return images

    def observe(self, real_logits: Tensor) -> None:
        """Takes in the discriminator's logits of a step's real images, augmented, `[B]`; an adaptive one learns from them."""

    def adapted(self) -> Tensor | None:
        """The probability of its changes now, 0-d, where it is adapted as training goes."""
        return None


def axis_shape(values: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1, 1]`, to go with images."""
    return values.view(-1, 1, 1, 1)


def happens(probability: Tensor, count: int) -> Tensor:
    """For each of `count` images whether something of this probability happens, bool `[count]`."""
    return torch.rand(count, device=probability.device) < probability
