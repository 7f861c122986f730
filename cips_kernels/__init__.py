"""Fused kernels for the per-pixel modulated fully-connected stack of coordinate-based image generators."""

from . import functional, reference
from .backends import backends, use_backend
from .encoding import Encoding
from .modules import FusedModFC, FusedModFCStack, FusedToRGB
from .patch import PatchReport, patch, unpatch
from .prepared import PreparedStack

__version__ = "0.1.0"
__all__ = [
    "Encoding",
    "FusedModFC",
    "FusedModFCStack",
    "FusedToRGB",
    "PatchReport",
    "PreparedStack",
    "backends",
    "functional",
    "patch",
    "reference",
    "unpatch",
    "use_backend",
]
