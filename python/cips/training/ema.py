"""The averaged generator, which is the one that is sampled and kept."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class AveragedModel(Generic[Model]):
    """Exponential moving average of a model's parameters: `avg = decay avg + (1 - decay) value`; buffers are
    copied.

    One launch for all parameters. `torch.optim.swa_utils.AveragedModel` reads its step counter on the host
    at every update, which would make it wait for the GPU.

    Args:
        model: averaged from its present values on.
        decay: a step, in [0, 1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = (list(self.module.parameters()), list(model.parameters()))
        self._source = model

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the model's present values."""
        torch._foreach_lerp_(*self._pairs, weight=1 - self.decay)
        for mine, theirs in zip(self.module.buffers(), self._source.buffers()):
            mine.copy_(theirs)
