"""How a set of images is named on the command line."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .earth import EarthCrops
from .folder import ImageFolder
from .source import ImageSource


def open_source(name: str, size: int) -> ImageSource:
    """The images called `name`: "earth", or the path of a folder.

    Raises:
        UsageError: neither, or the images cannot serve `size`.
    """
    if name == "earth":
        return EarthCrops(size)
    if Path(name).is_dir():
        return ImageFolder(name, size)
    what = "a file" if Path(name).exists() else "no such folder"
    raise UsageError(f"data: expected 'earth' (built in) or a folder of images, got {name!r} ({what})")
