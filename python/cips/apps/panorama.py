"""Panoramas: a picture on a cylinder, whose two ends meet, with one latent or several round it (CIPS section 4.8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import grids
from ..generator import Generator
from .draw import Noise, draw, styles


def ring_weights(width: int, count: int, angle: int = 360, start: int = 0) -> Tensor:
    """Weights `[width, count]` of latents that stand at equal distances round a cylinder.

    Latent k stands at 360 k / count degrees; between it and the next the weights go over linearly, from the last
    one to the first too. Columns as in `grids.cylinder`.
    """
    turn = 360 * width
    step = (start % 360 * width + angle * torch.arange(width)) % turn  # in integers, as the grid: one turn on, the same
    apart = (step[:, None] * count - torch.arange(count) * turn).remainder(turn * count)
    apart = torch.minimum(apart, turn * count - apart).double() / turn
    return (1 - apart).clamp_min(0).float() if count > 1 else torch.ones(width, 1)


def natural_size(
    size: tuple[int, int], angle: int = 360, wrap: str = "mirror", inner: float = 0.25
) -> tuple[int, int]:
    """(height, width) at which a panorama has the pixels of an image of `size`, neither stretched nor denser."""
    height, width = grids.as_size(size)
    if wrap == "mirror":
        turn = 2 * max(width - 1, 1)
    else:
        turn, height = math.pi * (1 + inner) / 2 * (width - 1), round((1 - inner) / 2 * (height - 1)) + 1
    return height, max(1, round(turn * angle / 360))


def panorama(
    generator: Generator,
    z: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    angle: int = 360,
    start: int = 0,
    wrap: str = "mirror",
    truncation: float = 1.0,
    noise: Noise = 0,
) -> Tensor:
    """A cylindrical panorama whose last column goes on in its first.

    Args:
        z: latents `[K, style_dim]`; with more than one the style goes over from each to the next, once round.
        size: (height, width); None: `natural_size` of the generator's.
        angle, start, wrap: as in `grids.cylinder`.
        truncation, noise: as in `Generator.forward`.

    Returns:
        float32 `[3, H, W]`.

    Raises:
        ValueError: naming the argument.
    """
    shape = natural_size(generator.config.size, angle, wrap) if size is None else grids.as_size(size)
    w = styles(generator, z, truncation)
    coords = grids.cylinder(*shape, angle, start=start, wrap=wrap, device=w.device)
    if len(w) == 1:
        return draw(generator, w[0], coords=coords, noise=noise)
    weights = ring_weights(shape[1], len(w), angle, start).to(w).expand(shape[0], -1, -1)
    return draw(generator, w, coords=coords, blend=weights, noise=noise)
