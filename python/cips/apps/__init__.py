"""What a generator of independent pixels can do besides sampling: one application a file, on top of `Generator`.

    w = apps.draw.latents(generator, 2, seed=1)
    frames = apps.interpolate(generator, w, frames=60)
    image = apps.panorama(generator, w)

Pictures are float32 `[3, H, W]`, nominally in [-1, 1], and not clipped.
"""

from __future__ import annotations

from . import draw
from .blend import blend, mask_positions, pixel_weights
from .foveate import Foveation, fill, foveate
from .giga import giga
from .interpolate import interpolate
from .mix import layer_groups, mix, mixed_styles, paper_groups
from .panorama import natural_size, panorama, ring_weights
from .upscale import Upscaled, lanczos, upscale

__all__ = [
    "Foveation",
    "Upscaled",
    "blend",
    "draw",
    "fill",
    "foveate",
    "giga",
    "interpolate",
    "lanczos",
    "layer_groups",
    "mask_positions",
    "mix",
    "mixed_styles",
    "natural_size",
    "panorama",
    "paper_groups",
    "pixel_weights",
    "ring_weights",
    "upscale",
]
