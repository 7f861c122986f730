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
    config: Config | str, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Generator | StyleGAN2:
    """The generator of a configuration, or of a preset's name, with new random weights; `dtype` and `backend` as in
    `Generator`.

    Raises:
        ValueError: no preset is called so.
    """
    if isinstance(config, str):
        if config not in presets:
            raise ValueError(f"config: expected one of {', '.join(presets)}, got {config!r}")
        config = presets[config]
    kind = StyleGAN2 if isinstance(config, StyleGAN2Config) else Generator
    return kind(config, dtype=dtype, backend=backend)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration whose `to_dict` gave `values`: those of a StyleGAN2 say so by their `architecture`.

    Raises:
        ValueError: a field that this version does not know, or a value out of range.
    """
    return (StyleGAN2Config if "architecture" in values else GeneratorConfig).from_dict(values)
