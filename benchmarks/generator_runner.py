"""One group of measurements of whole images: `runner.Group` with another problem, another check, and forward only."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

import generator_providers
from cases import FORWARD
from ceilings import Ceilings
from generator_cases import GeneratorCase, GeneratorProblem, make_problem
from generator_checks import GeneratorChecker
from generator_providers import GeneratorProvider
from measure import peak_bytes
from runner import MIB, Contender, Group, Options, Outcome

Build = Callable[..., GeneratorProvider]


class GeneratorGroup(Group):
    """A whole generator's case at one size on one device."""

    case: GeneratorCase

    def __init__(
        self,
        case: GeneratorCase,
        options: Options,
        ceilings: Ceilings,
        build: Build = generator_providers.build,
    ) -> None:
        self.build = build
        super().__init__(case, options, ceilings)

    @staticmethod
    def chosen(case: GeneratorCase, options: Options) -> tuple[list[str], list[str]]:
        """Providers and modes of a case, of those asked for."""
        names = [name for name in options.providers if name not in case.left_out]
        return names, [mode for mode in options.modes if mode == FORWARD]

    def run(self, seconds: float, followers: int = 0) -> Outcome:
        """As `Group.run`; what the case leaves out is listed."""
        for name in self.options.providers:
            if name in self.case.left_out:
                self._leave_out(name, "not timed in this case unless named in --providers")
        return super().run(seconds, followers)

    def _load(self) -> None:
        # A single set: a call reads parameters once and writes activations that sweep the caches.
        self.sets = [make_problem(self.case, self.options.device, self.options.seed)]
        self.checker = GeneratorChecker(self.sets[0], self.options.sample, self.options.seed)

    def _build(self, name: str, planes: str) -> GeneratorProvider:
        return self.build(name, self.options.device, self.case.dtype, planes)

    def _planes_provider(self, planes: str) -> GeneratorProvider:
        return generator_providers.build("grouped_conv", self.options.device, self.case.dtype, planes)

    def _memory(
        self,
        provider: GeneratorProvider,
        call: Callable[[GeneratorProblem], object],
        adapted: GeneratorProblem,
    ) -> tuple[int | None, int | None]:
        """Bytes beyond the float32 parameters and the image: most in preparing and one call, and what stays.

        What a provider makes ready once counts as well as what a call needs, so it is made ready once more here.
        """
        device, problem = self.options.device, self.sets[0]
        image = problem.result_bytes
        made: list[GeneratorProblem] = []

        def once() -> None:
            made.append(provider.adapt(problem))
            call(made[0])

        if device.type != "cuda":
            peak = peak_bytes(once, device)
            return None if peak is None else max(0, peak - image), None
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        peak = peak_bytes(once, device)
        assert peak is not None
        return max(0, peak - image), max(0, torch.cuda.memory_allocated(device) - before)

    def _head(self, provider: str, mode: str) -> dict:
        return super()._head(provider, mode) | {"pixels": self.case.pixels}

    def _row(self, mode: str, contender: Contender, rates: dict[str, float]) -> dict:
        kept = contender.kept
        return super()._row(mode, contender, rates) | {"kept_mb": None if kept is None else kept / MIB}
