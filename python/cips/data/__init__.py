"""Training images: the built-in satellite set and folders of images."""

from __future__ import annotations

from .batches import Batches
from .catalog import open_source
from .earth import EarthCrops
from .folder import ImageFolder
from .source import ImageSource, normalise

__all__ = ["Batches", "EarthCrops", "ImageFolder", "ImageSource", "normalise", "open_source"]
