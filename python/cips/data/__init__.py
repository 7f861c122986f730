"""Training images: the built-in satellite set, and folders, zips, LMDBs and tar shards of images."""

from __future__ import annotations

from .augment import augment
from .batches import Batches
from .cache import Decoded, cache_folder, decoded_images
from .catalog import check_fit, open_source
from .container import Container
from .decode import to_rgb
from .earth import EarthCrops
from .folder import FolderFiles
from .lmdb_files import LmdbFiles
from .prepare import Preparation, TooSmallError
from .recognise import data_name, open_container
from .shards import TarShards
from .source import ImageSource, normalise
from .stored import StoredImages
from .zipped import ZipFiles

__all__ = [
    "Batches",
    "Container",
    "Decoded",
    "EarthCrops",
    "FolderFiles",
    "ImageSource",
    "LmdbFiles",
    "Preparation",
    "StoredImages",
    "TarShards",
    "TooSmallError",
    "ZipFiles",
    "augment",
    "cache_folder",
    "check_fit",
    "data_name",
    "decoded_images",
    "normalise",
    "open_container",
    "open_source",
    "to_rgb",
]
