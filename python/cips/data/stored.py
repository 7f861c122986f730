"""Prepared images, of whatever origin, as a training set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..grids import as_size
from .cache import Decoded
from .source import EVERY, ImageSource, digest

SAMPLED, RUN = 4096, 16  # images that a fingerprint looks into at most, and pixels of each
DEVICE_BYTES = 4 * 2**30  # larger sets stay in the host's memory and travel batch by batch


class StoredImages(ImageSource):
    """Prepared images, as one row of pixels on the device, or on the host where they do not fit.

    Args:
        decoded: the images.
        size: of what is cut out of them, one number or (height, width): the middle, or anywhere (see `images`).
        name: for messages and file names.
    """

    def __init__(self, decoded: Decoded, size: int | tuple[int, int], name: str) -> None:
        self.name, self.size, self.names, self.skipped = name, size, decoded.names, decoded.skipped
        self.shapes = decoded.shapes
        areas = self.shapes.prod(1)
        self._starts = np.cumsum(areas) - areas
        self._rooms = self.shapes - np.array(as_size(size))  # the largest corner of a cut
        self.pixels = torch.from_numpy(np.asarray(decoded.pixels))
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> StoredImages:
        self._device = torch.empty(0, device=device).device  # with its number: "cuda" alone never equals it
        if self.pixels.numel() <= DEVICE_BYTES:
            self.pixels = self.pixels.to(self._device)
        return self

    def corners(self, index: np.ndarray, random: np.random.Generator | None = None) -> np.ndarray:
        """First row and column of what `images` cuts out: int64 `[B, 2]`."""
        rooms = self._rooms[index]
        if random is None or not self._rooms.any():
            return rooms // 2
        return random.integers(0, rooms, endpoint=True)

    def fingerprint(self) -> dict[str, str]:
        names = digest("\n".join(self.names).encode(), self.shapes.tobytes())
        # of a set that may be larger than memory only a run of pixels in the middle of some of its images
        some = np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(np.int64))
        first = torch.from_numpy((self._starts + self.shapes.prod(1) // 2)[some]).to(self.pixels.device)
        places = (first[:, None] + torch.arange(RUN, device=first.device)).clamp(max=len(self.pixels) - 1)
        pixels = self.pixels[places].cpu().numpy().tobytes()
        return {"images": str(len(self)), "names": names, "pixels": digest(pixels)}

    def images(
        self, index: np.ndarray, random: np.random.Generator | None = None, part: slice = EVERY
    ) -> Tensor:
        corners = self.corners(index, random)[part]
        widths, starts = self.shapes[index[part], 1], self._starts[index[part]]
        first = starts + corners[:, 0] * widths + corners[:, 1]
        if self.pixels.device.type != "cpu":
            # copies this small do not make the host wait for the device
            places = torch.from_numpy(np.stack((first, widths))).to(self._device, non_blocking=True)
            return gather(self.pixels, *places, self.size)
        batch = copy_cuts(self.pixels.numpy(), first, widths, self.size)
        return (batch.pin_memory() if self._device.type == "cuda" else batch).to(
            self._device, non_blocking=True
        )


def gather(pixels: Tensor, first: Tensor, widths: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Rectangles out of images that lie one after the other, in one indexing: a device's way.

    Args:
        pixels: `[P, 3]`.
        first: number of each one's first pixel, int64 `[B]`.
        widths: of the image that each lies in, int64 `[B]`.
        size: of each, one number or (height, width).

    Returns:
        `[B, height, width, 3]`, of the dtype and device of `pixels`.
    """
    rows, columns = (torch.arange(count, device=pixels.device) for count in as_size(size))
    return pixels[first[:, None, None] + widths[:, None, None] * rows[:, None] + columns]


def copy_cuts(pixels: np.ndarray, first: np.ndarray, widths: np.ndarray, size: int | tuple[int, int]) -> Tensor:
    """The same line by line: the host's way, which reads of a mapped file only what the rectangles cover."""
    high, wide = as_size(size)
    batch = torch.empty(len(first), high, wide, 3, dtype=torch.uint8)
    for cut, start, width in zip(batch.numpy(), first, widths):
        rows = pixels[start : start + (high - 1) * width + wide]
        line, value = rows.strides
        cut[:] = np.lib.stride_tricks.as_strided(rows, (high, wide, 3), (int(width) * line, line, value))
    return batch
