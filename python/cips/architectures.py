"""From a configuration to the generator that it describes, whichever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .config import GeneratorConfig, presets
from .generator import Generator
from .stylegan2 import StyleGAN2
from .stylegan2_config import StyleGAN2Config

Config = GeneratorConfig | StyleGAN2Config


def make_generator(
    config: Config | str, *, dtype: torch.dtype | None = None, backend: str = "auto", save: str = "all"
) -> Generator | StyleGAN2:
    """The generator of a configuration, or of a preset's name, with new random weights; `dtype`, `backend` and `save`
    as in `Generator`; StyleGAN2's has layers that keep everything.

    Raises:
        ValueError: no preset is called so; `save` with StyleGAN2's.
    """
    if isinstance(config, str):
        if config not in presets:
            raise ValueError(f"config: expected one of {', '.join(presets)}, got {config!r}")
        config = presets[config]
    if isinstance(config, StyleGAN2Config):
        if save != "all":
            raise ValueError(f"save: expected 'all' with StyleGAN2's generator, got {save!r}")
        return StyleGAN2(config, dtype=dtype, backend=backend)
    return Generator(config, dtype=dtype, backend=backend, save=save)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration whose `to_dict` gave `values`: those of a StyleGAN2 say so by their `architecture`.

    Raises:
        ValueError: a field that this version does not know, or a value out of range.
    """
    return (StyleGAN2Config if "architecture" in values else GeneratorConfig).from_dict(values)
