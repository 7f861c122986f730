"""Augmentations of what the discriminator sees, one a file."""

from __future__ import annotations

from collections.abc import Sequence

from . import ada, diffaug
from .ada import AdaptiveAugment
from .base import Augmentation
from .diffaug import DiffAugment

__all__ = ["AUGMENTATIONS", "AdaptiveAugment", "Augmentation", "DiffAugment", "ada", "diffaug", "make_augmentation"]

AUGMENTATIONS = {"none": (), "diffaug": diffaug.KINDS, "ada": ada.KINDS}
"""Names, and the kinds of change that each has."""


def make_augmentation(
    name: str, kinds: Sequence[str], *, target: float, images: float, fixed: float | None
) -> Augmentation:
    """One of `AUGMENTATIONS`; `target`, `images` and `fixed` are those of `AdaptiveAugment`."""
    if name == "ada":
        return AdaptiveAugment(kinds, target=target, images=images, fixed=fixed)
    return DiffAugment(kinds) if name == "diffaug" else Augmentation()
