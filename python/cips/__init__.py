"""cips: the generator of "Image Generators with Conditionally-Independent Pixel Synthesis" on the fused
kernels.

g = cips.Generator("paper")
images = g(torch.randn(4, 512))                                # [4, 3, 256, 256]
corner = g(z, cips.grids.tile(256, 0, 0, 32, 32), noise=1)     # the same pixels, computed alone
"""

from __future__ import annotations

from . import apps, grids
from .architectures import make_generator
from .checkpoint import load_generator, save_generator
from .config import DiscriminatorConfig, GeneratorConfig, official_config, presets
from .discriminator import Discriminator
from .errors import UsageError
from .generator import Generator
from .sampler import Sampler
from .stylegan2 import StyleGAN2
from .stylegan2_config import StyleGAN2Config

__all__ = [
    "Discriminator",
    "DiscriminatorConfig",
    "Generator",
    "GeneratorConfig",
    "Sampler",
    "StyleGAN2",
    "StyleGAN2Config",
    "UsageError",
    "apps",
    "grids",
    "load_generator",
    "make_generator",
    "official_config",
    "presets",
    "save_generator",
]
