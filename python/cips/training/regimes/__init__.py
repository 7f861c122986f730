"""Training regimes, one a file: the whole image, patches, a cylinder; and stages of growing size."""

from __future__ import annotations

from .cylinder import Cylinder
from .patches import Patches, check_patch
from .regime import FullImage, Regime, Sight
from .stages import parse_stages

__all__ = ["REGIMES", "Cylinder", "FullImage", "Patches", "Regime", "Sight", "check_patch", "parse_stages"]

REGIMES = ("full", "patch", "cylinder")
