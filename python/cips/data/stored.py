"""Prepared images, of whatever origin, as a training set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cache import Decoded
from .source import EVERY, ImageSource, digest

SAMPLED, RUN = 4096, 16  # images that a fingerprint looks into at most, and pixels of each
DEVICE_BYTES = 4 * 2**30  # larger sets stay in the host's memory and travel batch by batch


class StoredImages(ImageSource):
    """Prepared images, as one row of pixels on the device, or on the host where they do not fit.

    Args:
        decoded: the images.
        size: height and width of what is cut out of them: the middle, or anywhere (see `images`).
        name: for messages and file names.
    """

    def __init__(self, decoded: Decoded, size: int, name: str) -> None:
        self.name, self.size, self.names, self.skipped = name, size, decoded.names, decoded.skipped
        self.shapes = decoded.shapes
        areas = self.shapes.prod(1)
        self._starts = np.cumsum(areas) - areas
        self._rooms = self.shapes - size  # the largest corner of a cut
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


def gather(pixels: Tensor, first: Tensor, widths: Tensor, size: int) -> Tensor:
    """Squares out of images that lie one after the other, in one indexing: a device's way.

    Args:
        pixels: `[P, 3]`.
        first: number of each square's first pixel, int64 `[B]`.
        widths: of the image that each lies in, int64 `[B]`.
        size: pixels a side.

    Returns:
        `[B, size, size, 3]`, of the dtype and device of `pixels`.
    """
    line = torch.arange(size, device=pixels.device)
    return pixels[first[:, None, None] + widths[:, None, None] * line[:, None] + line]


def copy_cuts(pixels: np.ndarray, first: np.ndarray, widths: np.ndarray, size: int) -> Tensor:
    """The same line by line: the host's way, which reads of a mapped file only what the squares cover."""
    batch = torch.empty(len(first), size, size, 3, dtype=torch.uint8)
    for square, start, width in zip(batch.numpy(), first, widths):
        rows = pixels[start : start + (size - 1) * width + size]
        line, value = rows.strides
        square[:] = np.lib.stride_tricks.as_strided(rows, (size, size, 3), (int(width) * line, line, value))
    return batch
