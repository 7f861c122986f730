"""What the tests of the benchmark share: a small case, options, cheap ceilings, the stack written out.

Importing this page puts `benchmarks/` on the path.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from cases import MODES, Problem, make_case  # noqa: E402
from ceilings import Ceilings  # noqa: E402
from runner import Budget, Options  # noqa: E402

CPU = torch.device("cpu")


def small(name: str = "stack", dtype: torch.dtype = torch.float32, batch: int = 2, layers: int = 15):
    return make_case(name, batch=batch, height=6, width=7, dtype=dtype, channels=32, layers=layers)


def options(names: list[str], build: Callable | None = None, said: list[str] | None = None) -> Options:
    """Options for `Group`: both modes, every pixel checked, and no more rounds than it takes."""
    chosen = Options(
        device=CPU,
        providers=names,
        modes=list(MODES),
        sample=64,
        rounds=3,
        least_rounds=2,
        budget=Budget(600.0),
        say=(said if said is not None else []).append,
        progress=lambda title, steps: steps,
        compiler_fault=lambda device: None,
    )
    return chosen if build is None else dataclasses.replace(chosen, build=build)


class SmallCeilings(Ceilings):
    """Ceilings that cost nothing here."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.side, self.copy_bytes = 64, 2**16


def written_out(problem: Problem, noise: Tensor | None) -> Tensor:
    """The stack in float64 by loops over images and layers, from the formulas alone."""
    images = []
    for b in range(problem.case.batch):
        x = problem.x[min(b, problem.x.shape[0] - 1)].detach().double()
        rgb = torch.zeros(x.shape[0], 3, dtype=torch.float64)
        for layer, weight in enumerate(problem.weights):
            v = (
                weight.detach().double()
                * problem.styles[layer][b].detach().double()
                / math.sqrt(weight.shape[1])
            )
            m = v / torch.sqrt((v * v).sum(1, keepdim=True) + 1e-8)
            y = x @ m.T + problem.biases[layer].detach().double()
            if noise is not None:
                y = y + problem.strengths[layer].detach().double() * noise[layer, b].double()[:, None]
            x = math.sqrt(2) * torch.maximum(y, 0.2 * y)
            if layer in problem.case.rgb_after:
                k = problem.case.rgb_after.index(layer)
                r = problem.rgb_weights[k].detach().double() * problem.rgb_styles[k][b].detach().double()
                rgb = rgb + x @ (r / math.sqrt(r.shape[1])).T + problem.rgb_biases[k].detach().double()
        images.append(rgb)
    return torch.stack(images)
