"""Training: the paper's losses, StyleGAN2's schedule, and a loop that loses nothing."""

from __future__ import annotations

from .config import TrainConfig
from .trainer import DivergenceError, train

__all__ = ["TrainConfig", "DivergenceError", "train"]
