"""What a set of training images is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor


class ImageSource(ABC):
    """A set of RGB images of one size, held in memory as uint8 on one device.

    Attributes:
        name: for messages and file names.
        size: of an image, one number for squares, otherwise (height, width).
    """

    name: str
    size: int | tuple[int, int]

    @abstractmethod
    def __len__(self) -> int:
        """Number of different images (before random offsets and flips)."""

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSource:
        """Moves the images to the device that trains, and returns self."""

    @abstractmethod
    def images(self, index: np.ndarray, random: np.random.Generator | None = None) -> Tensor:
        """Images by number.

        Args:
            index: integers in [0, len), `[B]`.
            random: for random offsets, where the source has room for them; None: the same image every time.

        Returns:
            uint8 `[B, height, width, 3]` on the source's device.
        """


def normalise(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, H, W]` in [-1, 1], channels-last in memory."""
    return images.permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)
