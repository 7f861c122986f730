"""The averaged generator out of the state of a training run, to draw with or to measure any checkpoint that was kept."""

from __future__ import annotations

import os

import torch

from .checkpoint import TRAINING_FORMAT, load_state, load_training
from .config import GeneratorConfig
from .errors import UsageError
from .generator import Generator
from .states import read_torch_file


def is_training_state(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a run's whole state, as `save_training` writes it.

    Raises:
        UsageError: no such file, or one that is not whole.
    """
    state = read_torch_file(path, "training state", lazy=True)
    return isinstance(state, dict) and state.get("format") == TRAINING_FORMAT


def load_averaged(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None
) -> Generator:
    """The averaged generator of a run's state, in eval mode on `device`: what `generator.safetensors` held at its step.

    Raises:
        UsageError: not a whole state of this package; a key is missing, extra or misshapen.
    """
    state = load_training(path)
    try:
        generator = Generator(GeneratorConfig.from_dict(state["generator_config"]), dtype=dtype)
        load_state(str(path), generator, state["average"])
    except KeyError as error:
        raise UsageError(f"{path}: key {error.args[0]!r} is missing") from error
    return generator.to(device).eval()
