"""Augmentations of what the discriminator sees, one a file."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UsageError
from . import ada, diffaug
from .ada import AdaptiveAugment
from .base import Augmentation
from .diffaug import DiffAugment

__all__ = ["AUGMENTATIONS", "AdaptiveAugment", "Augmentation", "DiffAugment", "ada", "diffaug", "make_augmentation", "parse_kinds"]

AUGMENTATIONS = {"none": (), "diffaug": diffaug.KINDS, "ada": ada.KINDS}
"""Names, and the kinds of change that each has."""

_DEFAULTS = {**AUGMENTATIONS, "ada": ada.DEFAULT}


def parse_kinds(name: str, text: str | None) -> tuple[str, ...]:
    """Kinds of change of one of `AUGMENTATIONS`, from "colour,cutout" or one of `ada.SETS`; None: those by default.

    Raises:
        UsageError: a kind that it does not have.
    """
    if text is None:
        return _DEFAULTS[name]
    known = AUGMENTATIONS[name]
    if not known:
        raise UsageError(f"augment_kinds: expected none with augment {name!r}, got {text!r}")
    sets = ada.SETS if name == "ada" else {}
    given = sets.get(text.strip()) or tuple(part.strip() for part in text.split(","))
    if not set(given) <= set(known):
        several = f", or one of {', '.join(sets)}" if sets else ""
        raise UsageError(f"augment_kinds: expected some of {', '.join(known)}{several}, got {text!r}")
    return given


def make_augmentation(
    name: str, kinds: Sequence[str], *, target: float, images: float, fixed: float | None
) -> Augmentation:
    """One of `AUGMENTATIONS`; `target`, `images` and `fixed` are those of `AdaptiveAugment`."""
    if name == "ada":
        return AdaptiveAugment(kinds, target=target, images=images, fixed=fixed)
    return DiffAugment(kinds) if name == "diffaug" else Augmentation()
