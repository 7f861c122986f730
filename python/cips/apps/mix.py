"""Layer-wise style mixing: some layers take their style from one latent, the rest from another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..generator import Generator, GeneratorConfig
from .draw import Noise, draw, styles


def layer_groups(config: GeneratorConfig) -> tuple[tuple[int, ...], ...]:
    """The rows of W+ that each group of layers reads, group 1 first.

    The paper numbers "layers 1-2, 3-5, 6-8" (Figure 19) in a generator of 15 modulated layers. The reading that fits
    is the supplement's: a first layer, and then seven times two layers and a ToRGB, eight groups in all. So layers
    are taken in pairs from the last one back, and with an odd number the first layer is a group of its own. A
    ToRGB belongs to the group whose layer it follows.
    """
    layers = len(config.layer_widths)
    starts = [0, *range(1 if layers % 2 else 2, layers, 2)]
    ends = [*starts[1:], layers]
    return tuple(
        (*range(first, last), *(layers + k for k, after in enumerate(config.rgb_layers) if first <= after < last))
        for first, last in zip(starts, ends)
    )


def paper_groups(count: int) -> list[list[int]]:
    """Groups 6-8, 3-5 and 1-2 of Figure 19; of `count` other than 8, as near to those shares as it goes."""
    low, high = (max(1, round(count * share)) for share in (2 / 8, 5 / 8))
    high = min(max(high, low + 1), count)
    parts = [range(high + 1, count + 1), range(low + 1, high + 1), range(1, low + 1)]
    return [list(part) for part in parts if part]


def mixed_styles(config: GeneratorConfig, w: Tensor, other: Tensor, groups: Iterable[int]) -> Tensor:
    """W+ `[n_styles, style_dim]` of `w`, but of `other` in the given groups.

    Args:
        w, other: `[style_dim]`.
        groups: numbers from 1, see `layer_groups`.

    Raises:
        ValueError: a group that the generator does not have.
    """
    rows = layer_groups(config)
    result = w.repeat(len(config.layer_widths) + len(config.rgb_layers), 1)
    for group in groups:
        if not 1 <= group <= len(rows):
            raise ValueError(f"groups: expected numbers from 1 to {len(rows)}, got {group}")
        result[list(rows[group - 1])] = other
    return result


def mix(
    generator: Generator,
    z: Tensor,
    other: Tensor,
    groups: Iterable[Iterable[int]] | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    truncation: float = 1.0,
    noise: Noise = 0,
) -> Tensor:
    """A row of Figure 19: A, B, and then A with the style of B in some groups of layers.

    Args:
        z, other: the latents of A and B, `[style_dim]`.
        groups: for each further picture the groups (numbers from 1) that take B's style; None: the paper's, see
            `paper_groups`.
        size, truncation, noise: as in `Generator.forward`.

    Returns:
        float32 `[2 + len(groups), 3, H, W]`.

    Raises:
        ValueError: naming the argument.
    """
    from tqdm import tqdm

    config = generator.config
    groups = paper_groups(len(layer_groups(config))) if groups is None else groups
    a, b = styles(generator, torch.stack((z, other)), truncation)
    rows = [a, b, *(mixed_styles(config, a, b, chosen) for chosen in groups)]
    bar = tqdm(rows, desc="mixing", unit="picture", delay=2, leave=False)
    return torch.stack([draw(generator, w, size=size, noise=noise) for w in bar])
