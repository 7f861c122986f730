"""Several latents in one picture: each pixel has a style of its own, a blend of theirs (CIPS section 4.8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import grids
from ..generator import Generator
from .draw import Noise, draw, styles

DIRECTIONS = ("horizontal", "vertical")


def mask_positions(size: int | tuple[int, int], direction: str = "horizontal") -> Tensor:
    """Where between the first latent (0) and the last (1) each pixel is: float32 `[H, W]`, left to right or top down.

    Raises:
        ValueError: naming the argument.
    """
    height, width = grids.as_size(size)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected {' or '.join(DIRECTIONS)}, got {direction!r}")
    count = width if direction == "horizontal" else height
    line = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    line = line[None, :] if direction == "horizontal" else line[:, None]
    return line.expand(height, width).float()


def pixel_weights(positions: Tensor, count: int, *, hard: bool = False) -> Tensor:
    """Weights `[H, W, count]` of `count` latents at `positions` `[H, W]` in [0, 1]; they add up to one.

    Smooth: latent k stands at k / (count - 1), and between two of them the weights go over linearly. Hard: `count`
    bands of equal width, each with one latent.

    Raises:
        ValueError: positions outside [0, 1], a count below 2.
    """
    if not isinstance(count, int) or count < 2:
        raise ValueError(f"count: expected an integer of at least 2, got {count!r}")
    if positions.dim() != 2 or not ((positions >= 0) & (positions <= 1)).all():
        raise ValueError(f"positions: expected [H, W] with numbers from 0 to 1, got shape {list(positions.shape)}")
    latent = torch.arange(count, device=positions.device)
    if hard:
        nearest = (positions * count).long().clamp_max(count - 1)
        return (nearest[..., None] == latent).float()
    return (1 - (positions[..., None] * (count - 1) - latent).abs()).clamp_min(0)


def blend(
    generator: Generator,
    z: Tensor,
    weights: Tensor,
    *,
    truncation: float = 1.0,
    noise: Noise = 0,
) -> Tensor:
    """A picture whose pixel p has the style w_p = sum_k weights_pk w_k.

    Args:
        z: latents `[K, style_dim]`.
        weights: `[H, W, K]`, see `pixel_weights`; H x W is the size of the picture.
        truncation, noise: as in `Generator.forward`.

    Returns:
        float32 `[3, H, W]`.

    Raises:
        ValueError: naming the argument.
    """
    if weights.dim() != 3 or weights.shape[-1] != len(z):
        raise ValueError(f"weights: expected [H, W, {len(z)}], got {list(weights.shape)}")
    w = styles(generator, z, truncation)
    return draw(generator, w, size=tuple(weights.shape[:2]), blend=weights.to(w), noise=noise)
