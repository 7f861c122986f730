"""Foveated synthesis: only some pixels are computed, most of them where the gaze is (CIPS section 4.7)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..errors import UsageError
from ..generator import Generator
from .draw import Noise, strip_size


class Foveation(NamedTuple):
    """What `foveate` returns.

    Attributes:
        image: float32 `[3, H, W]` on the CPU; the computed pixels as the generator gave them, the others filled.
        positions: int64 `[P, 2]`, (row, column) of the computed pixels.
        draw_seconds: time for computing them.
        fill_seconds: time for filling the others.
    """

    image: Tensor
    positions: Tensor
    draw_seconds: float
    fill_seconds: float


def fill(colours: Tensor, positions: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture from some of its pixels, the others by cubic interpolation over a triangulation of those.

    Args:
        colours: `[P, C]`, on the CPU.
        positions: integers `[P, 2]` (row, column); the four corners must be among them, since nothing is known
            outside the hull of the points.
        size: (height, width), each at least 2.

    Returns:
        float32 `[H, W, C]`; `colours` themselves at `positions`.

    Raises:
        ValueError: a corner is missing.
        UsageError: scipy is not installed.
    """
    griddata = _griddata()
    height, width = size
    known = np.zeros(size, dtype=bool)
    rows, columns = positions.T.numpy()
    known[rows, columns] = True
    if not known[[0, 0, -1, -1], [0, -1, 0, -1]].all():
        raise ValueError("positions: expected the four corners of the picture among them")
    image = np.empty((height, width, colours.shape[1]), dtype=np.float32)
    image[rows, columns] = colours.float().numpy()
    if not known.all():
        wanted = np.argwhere(~known)
        # the same scale both ways: the triangulation is that of the pixels
        found = griddata(positions.numpy(), colours.double().numpy(), wanted, method="cubic")
        image[~known] = found.astype(np.float32)
    return torch.from_numpy(image)


@torch.no_grad()
def foveate(
    generator: Generator,
    z: Tensor,
    share: float,
    *,
    gaze: Sequence[float] = (0.0, 0.0),
    sigma: float = 0.4,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    truncation: float = 1.0,
    noise: Noise = 0,
    rehearse: bool = False,
) -> Foveation:
    """One image of which `share` of the pixels and the four corners are computed, the rest filled.

    Args:
        z: the latent `[style_dim]`.
        share, gaze, sigma, seed: as in `grids.foveated`.
        size, truncation, noise: as in `Generator.forward`; each side at least 2.
        rehearse: compute the pixels once before, so that compiling kernels is not in `draw_seconds`.

    Returns:
        See `Foveation`. A computed pixel is that of the full image.

    Raises:
        ValueError: naming the argument.
        UsageError: scipy is not installed.
    """
    height, width = shape = grids.as_size(generator.config.size if size is None else size)
    if min(shape) < 2:
        raise ValueError(f"size: expected at least 2 pixels a side, got {height}x{width}")
    _, positions = grids.foveated(shape, share, gaze, sigma, seed)
    corners = torch.tensor([(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)])
    positions = torch.unique(torch.cat((positions, corners)), dim=0)
    points = grids.pixels(positions, shape).to(generator.w_mean.device)
    _griddata()  # its import is not timed
    for _ in range(2 if rehearse else 1):
        began = time.perf_counter()
        w = generator.styles(z[None], truncation=truncation)
        strips = points.split(strip_size(w.device))
        parts = [generator(w, strip, input_is_w=True, noise=noise)[0].cpu() for strip in strips]
        drawn = time.perf_counter()  # the copy to the CPU has waited for the device
    image = fill(torch.cat(parts), positions, shape)
    return Foveation(image.permute(2, 0, 1), positions, drawn - began, time.perf_counter() - drawn)


def _griddata() -> Callable[..., np.ndarray]:
    try:
        from scipy.interpolate import griddata
    except ImportError as error:
        raise UsageError("filling pixels needs scipy; install the extra: pip install -e '.[apps]'") from error
    return griddata
