"""A film from one latent to the next (CIPS section 4.6: latent linear morphing)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..generator import Generator
from .draw import Noise, draw, styles

SPACES = ("w", "z")


def interpolate(
    generator: Generator,
    z: Tensor,
    frames: int,
    *,
    space: str = "w",
    loop: bool = False,
    size: int | tuple[int, int] | None = None,
    truncation: float = 1.0,
    noise: Noise = 0,
) -> Iterator[Tensor]:
    """Frames that go from latent to latent in equal steps.

        v(t) = (1 - t) v_k + t v_(k+1)          v: w, or z before the mapping network

    The first and the last frame are the images of the first and the last latent, bit for bit. All frames share one
    noise, so that it stands still.

    Args:
        z: latents `[K, style_dim]`, K at least 2.
        frames: number of frames in all, at least 2.
        space: "w" or "z"; the mapping network normalises z, so that in "z" the way is a great circle.
        loop: go back to the first latent; the frame that would repeat the first one is left out.
        size, truncation, noise: as in `Generator.forward`.

    Returns:
        An iterator over float32 pictures `[3, H, W]`, drawn one by one as they are asked for.

    Raises:
        ValueError: naming the argument.
    """
    if space not in SPACES:
        raise ValueError(f"space: expected {' or '.join(SPACES)}, got {space!r}")
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 2:
        raise ValueError(f"frames: expected an integer of at least 2, got {frames!r}")
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(f"z: expected at least two latents [K, {generator.config.style_dim}], got {list(z.shape)}")
    return _frames(generator, z, frames, space, loop, size, truncation, noise)


def _frames(
    generator: Generator,
    z: Tensor,
    frames: int,
    space: str,
    loop: bool,
    size: int | tuple[int, int] | None,
    truncation: float,
    noise: Noise,
) -> Iterator[Tensor]:
    ways = len(z) if loop else len(z) - 1
    steps = frames if loop else frames - 1
    ends = styles(generator, z, truncation) if space == "w" else z
    for frame in range(frames):
        way, rest = divmod(frame * ways, steps)  # in integers: at a latent, t is exactly 0
        here, there = ends[way % len(z)], ends[(way + 1) % len(z)]
        value = torch.lerp(here, there, rest / steps) if rest else here
        w = value if space == "w" else styles(generator, value[None], truncation)[0]
        yield draw(generator, w, size=size, noise=noise)
