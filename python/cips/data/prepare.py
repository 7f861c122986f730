"""What is kept of an image for training at a size: scaled once, before anything random."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from .decode import open_image, to_rgb

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("centre", "random")
TOO_SMALL = ("refuse", "skip", "enlarge")


class TooSmallError(ValueError):
    """An image whose shorter side is below the training size."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a picture becomes training images of `size` x `size` pixels.

    1. Where its shorter side exceeds `load_size`, it is scaled down (Lanczos) until that side is `load_size`.
       None: `size` where crop is "centre"; no scaling where crop is "random".
    2. Where its shorter side is below `size`, "refuse" raises, "skip" leaves the picture out, "enlarge" scales it
       up (Lanczos) until that side is `size`. Nothing else ever scales up.
    3. "centre": the middle `size` x `size` is cut out and kept. "random": the whole picture is kept, and each time
       it is shown a `size` x `size` part is cut out, every position being equally likely.

    The paper's sets: Satellite-Buildings (300 px) and Satellite-Landscapes (512 px) at 256 with crop "random", no
    `load_size`, and quarter turns and mirroring (see `Batches`).

    Raises:
        UsageError: an option that cannot be.
    """

    size: int
    crop: str = "centre"
    load_size: int | None = None
    too_small: str = "refuse"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size: expected an integer of at least 1, got {self.size}")
        for name, allowed in (("crop", CROPS), ("too_small", TOO_SMALL)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.load_size is not None and self.load_size < self.size:
            raise UsageError(
                f"load_size: expected an integer of at least the training size {self.size}, got {self.load_size}"
            )

    def __call__(self, data: bytes) -> np.ndarray:
        """An encoded image as kept: uint8 `[height, width, 3]`, both at least `size`.

        Raises:
            TooSmallError: too small, and `too_small` is not "enlarge".
            ValueError: not an image, damaged, or of a mode without a known way to RGB.
        """
        image = self._scale(to_rgb(open_image(data)))
        if self.crop == "centre":
            left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)

    def _scale(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        shorter = min(image.size)
        limit = self.load_size or (self.size if self.crop == "centre" else shorter)
        if shorter < self.size and self.too_small != "enlarge":
            raise TooSmallError(
                f"is {image.width}x{image.height}, smaller than the training size {self.size}"
            )
        target = max(min(shorter, limit), self.size)
        if target == shorter:
            return image
        width, height = (max(round(side * target / shorter), target) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
