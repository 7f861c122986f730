"""What is kept of an image for training at a size: scaled once, before anything random."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from ..grids import as_size
from .decode import open_image, to_rgb

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("centre", "random")
TOO_SMALL = ("refuse", "skip", "enlarge")


class TooSmallError(ValueError):
    """An image that the training size does not fit into."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a picture becomes training images of `size`: one number for squares, or (height, width).

    1. Where its shorter side exceeds `load_size`, it is scaled down (Lanczos) until that side is `load_size`, or until
       it only just covers `size`. None: the latter where crop is "centre"; no scaling where crop is "random".
    2. Where `size` does not fit into it, "refuse" raises, "skip" leaves the picture out, "enlarge" scales it up
       (Lanczos) until it only just does. Nothing else ever scales up.
    3. "centre": the middle of `size` is cut out and kept. "random": the whole picture is kept, and each time it is
       shown a part of `size` is cut out, every position being equally likely.

    The paper's sets: Satellite-Buildings (300 px) and Satellite-Landscapes (512 px) at 256 with crop "random", no
    `load_size`, and quarter turns and mirroring (see `Batches`).

    Raises:
        UsageError: an option that cannot be.
    """

    size: int | tuple[int, int]
    crop: str = "centre"
    load_size: int | None = None
    too_small: str = "refuse"

    def __post_init__(self) -> None:
        try:
            height, width = as_size(self.size)
        except (TypeError, ValueError) as error:
            raise UsageError(f"size: expected an integer of at least 1, got {self.size}") from error
        # squares by one number: the name of what is cached follows it
        object.__setattr__(self, "size", height if height == width else (height, width))
        for name, allowed in (("crop", CROPS), ("too_small", TOO_SMALL)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.load_size is not None and self.load_size < min(height, width):
            raise UsageError(
                f"load_size: expected an integer of at least the training size {min(height, width)}, got {self.load_size}"
            )

    def __call__(self, data: bytes) -> np.ndarray:
        """An encoded image as kept: uint8 `[height, width, 3]`, at least of `size`.

        Raises:
            TooSmallError: too small, and `too_small` is not "enlarge".
            ValueError: not an image, damaged, or of a mode without a known way to RGB.
        """
        image = self._scale(to_rgb(open_image(data)))
        if self.crop == "centre":
            height, width = as_size(self.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)

    def check_size(self, width: int, height: int) -> int:
        """The shorter side at which a picture of this size only just covers the training size.

        Raises:
            TooSmallError: too small, and `too_small` is not "enlarge".
        """
        high, wide = as_size(self.size)
        shorter = min(width, height)
        least = max(-(-high * shorter // height), -(-wide * shorter // width))
        if shorter < least and self.too_small != "enlarge":
            shown = str(high) if high == wide else f"{wide}x{high} (width x height)"
            raise TooSmallError(f"is {width}x{height}, smaller than the training size {shown}")
        return least

    def _scale(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        height, width = as_size(self.size)
        shorter = min(image.size)
        least = self.check_size(*image.size)
        limit = self.load_size or (least if self.crop == "centre" else shorter)
        target = max(min(shorter, limit), least)
        if target == shorter:
            return image
        scaled = (max(round(side * target / shorter), low) for side, low in zip(image.size, (width, height)))
        return image.resize(tuple(scaled), Image.Resampling.LANCZOS)
