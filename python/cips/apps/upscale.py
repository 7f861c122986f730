"""More pixels than trained: a denser grid, beside Lanczos of the trained size (CIPS section 4.7, Figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..generator import Generator
from .draw import Noise, draw, styles


class Upscaled(NamedTuple):
    """What `upscale` returns, both float32 `[3, H, W]` of the same points: `dense` computed, `lanczos` resampled."""

    dense: Tensor
    lanczos: Tensor


def lanczos(image: Tensor, coords: Tensor) -> Tensor:
    """An image resampled by Pillow's Lanczos filter at the points of an axis-parallel grid.

    Args:
        image: `[3, H, W]`, whose corner pixels have their centres at -1 and +1, as in `grids.full`.
        coords: evenly spaced grid `[h, w, 2]` (x, y), finer than the image.

    Returns:
        float32 `[3, h, w]` on the CPU.
    """
    from PIL import Image

    height, width = image.shape[1:]
    edges = []
    for line, count in ((coords[0, :, 0], width), (coords[:, 0, 1], height)):
        # Pillow's centres are at i + 1/2: the box of which the first and last sample are the outermost centres
        first, last = (((t + 1) / 2 * (count - 1)) + 0.5 for t in (line[0].item(), line[-1].item()))
        half = (last - first) / (len(line) - 1) / 2 if len(line) > 1 else 0.5
        edges.append((max(first - half, 0.0), min(last + half, float(count))))
    (left, right), (top, bottom) = edges
    shape = coords.shape[1], coords.shape[0]
    planes = [Image.fromarray(plane) for plane in image.float().cpu().contiguous().numpy()]
    resized = [plane.resize(shape, Image.Resampling.LANCZOS, (left, top, right, bottom)) for plane in planes]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]))


def upscale(
    generator: Generator,
    z: Tensor,
    factor: float,
    *,
    centre: Sequence[float] | None = None,
    truncation: float = 1.0,
    noise: Noise = 0,
) -> Upscaled:
    """An image `factor` times the trained size, computed pixel by pixel, and the trained size enlarged.

    Args:
        z: the latent `[style_dim]`.
        factor: at least 1; the size is rounded.
        centre: (x, y) in [-1, 1]: show, of the large image, the window of the trained size about this point, which
            is all that is computed then.
        truncation, noise: as in `Generator.forward`.

    Returns:
        See `Upscaled`; `[3, factor H, factor W]`, or `[3, H, W]` with a centre.

    Raises:
        ValueError: naming the argument.
    """
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor: expected a number of at least 1, got {factor!r}")
    size, device = generator.config.size, generator.w_mean.device
    if centre is None:
        coords = grids.full(*(round(factor * n) for n in size), device)
    else:
        coords = grids.window(size, centre, factor, device)
    w = styles(generator, z[None], truncation)[0]
    own = draw(generator, w, noise=noise)
    return Upscaled(draw(generator, w, coords=coords, noise=noise).cpu(), lanczos(own, coords))
