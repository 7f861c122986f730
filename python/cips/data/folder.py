"""A folder of images as a training set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .source import ImageSource

DEVICE_BYTES = 4 * 2**30  # larger sets stay in the host's memory and travel batch by batch


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Every file below `folder` whose ending PIL knows, sorted; hidden files are left out."""
    from PIL import Image

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = (p for p in Path(folder).rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
    return sorted(p for p in paths if p.is_file())


def read_square(path: Path, size: int) -> np.ndarray:
    """One image as uint8 `[size, size, 3]`: turned as its EXIF says, the shorter side scaled to `size`
    (Lanczos, never up), the middle cut out.

    Raises:
        UsageError: not an image, damaged, or smaller than `size`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # PIL raises many kinds for damaged files
        raise UsageError(f"{path}: cannot be read as an image ({error})") from error
    if min(image.size) < size:
        raise UsageError(f"{path}: is {image.width}x{image.height}, smaller than the training size {size}")
    ratio = size / min(image.size)
    width, height = max(round(image.width * ratio), size), max(round(image.height * ratio), size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class ImageFolder(ImageSource):
    """All images below a folder, read once, uint8.

    Args:
        folder: searched with its subfolders for files that PIL can open.
        size: images are scaled down and cut to size x size, see `read_square`.

    Raises:
        UsageError: no images, or the first that cannot be read or is too small.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int) -> None:
        from tqdm import tqdm

        paths = list_images(folder)
        if not paths:
            raise UsageError(f"data: no images in the folder {str(folder)!r} or below it")
        self.name, self.size, self.paths = Path(folder).resolve().name, size, paths
        self.pixels = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
        self._device = torch.device("cpu")
        rows = self.pixels.numpy()

        def read(k: int) -> None:
            rows[k] = read_square(paths[k], size)

        # threads suffice: PIL decodes and scales with the interpreter lock released
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            jobs = pool.map(read, range(len(paths)))
            try:
                for _ in tqdm(jobs, total=len(paths), desc="reading images", delay=2, leave=False):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def __len__(self) -> int:
        return len(self.paths)

    def to(self, device: torch.device | str) -> ImageFolder:
        self._device = torch.device(device)
        if self.pixels.numel() <= DEVICE_BYTES:
            self.pixels = self.pixels.to(self._device)
            self._device = self.pixels.device  # with its number: "cuda" alone never equals it
        return self

    def images(self, index: np.ndarray, random: np.random.Generator | None = None) -> Tensor:
        where = torch.from_numpy(index)
        if self.pixels.device == self._device:
            return self.pixels[where.to(self._device, non_blocking=True)]
        batch = self.pixels[where]
        return (batch.pin_memory() if self._device.type == "cuda" else batch).to(
            self._device, non_blocking=True
        )
