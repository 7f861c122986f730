"""Random mirroring and quarter turns of a batch, on the device that holds it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .source import EVERY


def augment(
    images: Tensor,
    random: np.random.Generator,
    *,
    flip: bool = True,
    rotate: bool = False,
    count: int | None = None,
    part: slice = EVERY,
) -> Tensor:
    """First mirrors, then turns. The host draws one number an image for each; the pixels stay on their device.

    Args:
        images: of any dtype, `[B, H, W, C]`.
        random: draws first, where `flip`, B numbers u in [0, 1): image b is mirrored left to right where u < 0.5;
            then, where `rotate`, B integers k in 0..3: image b is turned by k quarters counter-clockwise.
        flip: mirror.
        rotate: turn; for square pictures without an up and a down, such as a satellite's.
        count: B, where `images` are only a part of a batch: numbers are drawn for all of it; None: they are all.
        part: which of the batch they are.

    Returns:
        The same dtype, device and shape, contiguous.
    """
    count = len(images) if count is None else count
    if flip:
        mirrored = random.random(count)[part] < 0.5
        images = _where(mirrored, images.flip(2), images)
    if rotate:
        quarters = random.integers(0, 4, count)[part]
        # a quarter turn is a transposition and a mirroring
        images = _where(quarters % 2 == 1, images.transpose(1, 2), images)
        images = _where((quarters == 1) | (quarters == 2), images.flip(1), images)
        images = _where(quarters >= 2, images.flip(2), images)
    return images.contiguous()


def _where(chosen: np.ndarray, yes: Tensor, no: Tensor) -> Tensor:
    mask = torch.from_numpy(chosen).to(no.device, non_blocking=True)
    return torch.where(mask[:, None, None, None], yes, no)
