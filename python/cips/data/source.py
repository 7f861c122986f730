"""What a set of training images is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

EVERY = slice(None)


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
    def fingerprint(self) -> dict[str, str]:
        """What tells two sets of images apart, each in short: "images" (how many), "names" (with their sizes), "pixels"
        (a sample of them). No times or paths: copies on two machines are the same set.
        """

    @abstractmethod
    def images(
        self, index: np.ndarray, random: np.random.Generator | None = None, part: slice = EVERY
    ) -> Tensor:
        """Images by number.

        Args:
            index: integers in [0, len), `[B]`.
            random: for random offsets, where the source has room for them; None: the same image every time.
            part: which of them are made; random numbers are drawn for all, so that the parts of a batch are made as
                the whole batch would be.

        Returns:
            uint8 `[B, height, width, 3]` on the source's device; of `part` alone.
        """


def digest(*parts: bytes) -> str:
    """Sixteen hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:16]


def normalise(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, H, W]` in [-1, 1], channels-last in memory."""
    return images.permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)
