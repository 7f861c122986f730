"""Is a whole image right? Providers' images against `cips.Generator` in float64 on the oracle's backend.

As in `checks.py`: the provider draws the very image that is timed, and a random sample of its pixels is compared;
every other pixel must be finite. The oracle gets the sampled pixels as points, which have the noise that they have
in the image: counter noise knows a pixel by its coordinates. A provider passes where its error is at most twice
that of the plain eager formulation (`generator_rivals.plain`) in the same dtype at the same points.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import generator_rivals
from cases import FORWARD
from checks import DRAWN, FLOOR, GIVEN, OFF, OUTPUT, Verdict
from cips_kernels import noise as counter_noise
from cips_kernels.testing import EAGER_FACTOR, poisoned_empty, relative_error
from generator_cases import GeneratorProblem
from generator_providers import GeneratorProvider, generator


@dataclass(frozen=True)
class _Setting:
    """One choice of noise: the oracle's pixels and the eager error."""

    expected: Tensor
    eager: float


class GeneratorChecker:
    """Checks providers on one problem.

    Args:
        problem: at full size.
        sample: pixels compared, at most.
        seed: of the choice of pixels.
    """

    def __init__(self, problem: GeneratorProblem, sample: int, seed: int = 0) -> None:
        self.problem = problem
        pixels = problem.case.pixels
        chosen = torch.arange(pixels)
        if sample < pixels:
            draw = torch.Generator().manual_seed(seed)
            ends = torch.tensor([0, pixels - 1])  # where tiles are cut off
            chosen = torch.cat([torch.randperm(pixels, generator=draw)[:sample], ends]).unique()
        self.chosen = chosen.to(problem.z.device)
        self._settings: dict[str, _Setting] = {}
        sums = torch.float64 if problem.case.dtype == torch.float64 else torch.float32
        self._floor = FLOOR * torch.finfo(sums).eps

    def noise(self, points: Tensor) -> Tensor:
        """Counter noise `[L, B, P]` of the problem's seed at `points [P, 2]`, in the compute dtype."""
        case = self.problem.case
        seed = torch.tensor(self.problem.seed, device=points.device)
        layers = [
            counter_noise.normal(seed, layer, case.batch, len(points), points).to(case.dtype)
            for layer in range(case.layers)
        ]
        return torch.stack(layers)

    def setting(self, name: str) -> _Setting:
        """What the oracle says with noise `OFF`, or else with counter noise."""
        name = OFF if name == OFF else DRAWN
        if name not in self._settings:
            problem, points = self.problem, self.problem.points()[self.chosen]
            off = name == OFF
            exact = exactly(problem, points, with_noise=not off)
            with torch.no_grad():
                eager = generator_rivals.plain(problem, self.chosen, None if off else self.noise(points))
            self._settings[name] = _Setting(exact, relative_error(eager, exact))
        return self._settings[name]

    def settings(self, provider: GeneratorProvider) -> tuple[str, ...]:
        """The noise a provider is checked with; compiled code only as it is timed, strengths zero."""
        return (OFF,) if provider.compiled else (OFF, DRAWN) if provider.seeded else (OFF, GIVEN)

    def check(self, provider: GeneratorProvider, mode: str = FORWARD) -> Verdict:
        """Run a provider and judge it by its worst setting; exceptions of the provider pass through."""
        assert mode == FORWARD
        verdicts = []
        for name in self.settings(provider):
            setting = self.setting(name)
            # whoever allocates through Python starts from NaN, so that an element left unwritten shows
            with poisoned_empty() if provider.seeded else nullcontext(), torch.no_grad():
                image = self._draw(provider, name)
            error = relative_error(image[:, self.chosen], setting.expected)
            if not bool(torch.isfinite(image).all()):
                error = math.inf
            eager = max(setting.eager, self._floor)
            quantity = f"{OUTPUT}, noise {name}"
            verdicts.append(Verdict(error, eager, setting.eager, quantity, error <= EAGER_FACTOR * eager))
        return max(verdicts, key=lambda verdict: verdict.error / verdict.error_eager)

    def _draw(self, provider: GeneratorProvider, name: str) -> Tensor:
        problem = self.problem
        if provider.compiled:
            problem = problem.without_noise()
        noise: Tensor | str | None = "fresh" if provider.compiled or name == DRAWN else None
        if name == GIVEN:
            noise = self.noise(problem.points())
        image = provider.to_pixels(provider.function(provider.adapt(problem), noise))
        wanted = [problem.case.batch, problem.case.pixels, 3]
        if list(image.shape) != wanted:
            raise ValueError(f"image: expected {wanted} pixels, got {list(image.shape)}")
        return image


@torch.no_grad()
def exactly(problem: GeneratorProblem, points: Tensor, with_noise: bool) -> Tensor:
    """The oracle's colours `[B, P, 3]` in float64 at `points [P, 2]`."""
    oracle = generator(problem, "reference").double()
    return oracle(problem.z.double(), points, noise=problem.seed if with_noise else "off")
