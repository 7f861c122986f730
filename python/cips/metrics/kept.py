"""Features of real images, computed once and found again by the content of the images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import atomic_file
from ..data import ImageSource, cache_folder
from .extractors import Extractor
from .share import share_rows

VERSION = 1  # raise it where what is computed from the same pixels changes
BLOCK = 256  # images a digest


def size_name(source: ImageSource) -> str:
    """Pixels a side of its images, or height x width: "64", "64x128"."""
    sides = source.size if isinstance(source.size, tuple) else (source.size,)
    return "x".join(map(str, sides))


def images_digest(source: ImageSource) -> str:
    """Digest of the pixels of every image, in order: the same for a folder, and for a zip of it."""

    def block(number: int, _: int) -> tuple[Tensor, ...]:
        index = np.arange(number * BLOCK, min((number + 1) * BLOCK, len(source)))
        pixels = source.images(index).cpu().contiguous()
        return (
            torch.frombuffer(bytearray(hashlib.sha256(pixels.numpy().data).digest()), dtype=torch.uint8)[
                None
            ],
        )

    (digests,) = share_rows(-(-len(source) // BLOCK), 1, block)
    return hashlib.sha256(
        f"{len(source)} {size_name(source)}".encode() + digests.numpy().tobytes()
    ).hexdigest()


def features_key(images: str, extractor: Extractor, layer: str) -> str:
    """Digest of all that the features of a layer depend on: pixels, extractor, its preprocessing, the kind of device."""
    parts = [VERSION, images, extractor.identity, layer, extractor.device.type]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def features_file(cache: str | None, source: ImageSource, extractor: Extractor, layer: str, key: str) -> Path:
    """Where they are kept."""
    name = f"{source.name}-{size_name(source)}-{extractor.label}-{layer}-{key[:16]}.safetensors"
    return cache_folder(cache) / "features" / name


def read_features(path: Path, key: str, count: int) -> tuple[Tensor | None, str]:
    """Features `[count, F]`, or None and why they are not used."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None, "not cached yet"
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        return None, f"the cache is damaged ({error})"
    if metadata.get("key") != key or features.dim() != 2 or len(features) != count:
        return None, "the cache holds something else"
    return features, ""


def write_features(path: Path, key: str, features: Tensor) -> None:
    """Keeps them, under a temporary name first.

    Raises:
        UsageError: they cannot be written.
    """
    from safetensors.torch import save

    with atomic_file(path) as file:
        file.write(save({"features": features.contiguous()}, {"key": key}))
