"""Who draws whole images: the two formulations of `generator_rivals.py`, each also compiled, and this package.

Ours are `cips.Generator` on each backend, called as a user calls it, from float32 parameters; and `sampler`, which is
`cips.Sampler`: parameters gathered once, on a GPU a call replayed as a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import generator_rivals
from cases import GENERATOR_ONLY, RIVALS
from cips import Generator
from cips_kernels.backends import NAMES as BACKENDS
from cips_kernels.backends import why_not
from generator_cases import GeneratorProblem
from providers import CHANNELS_LAST, PIXELS, PLANES
from rivals import Noise

Run = Callable[[Noise], Tensor]  # noise None (off), "fresh" or [L, B, P] -> image
NAMES = (*RIVALS, *BACKENDS, *GENERATOR_ONLY)


@dataclass(frozen=True)
class GeneratorProvider:
    """One way to draw a case's images; the attributes are those of `providers.Provider`.

    `prepare` makes ready what a provider keeps between calls, and returns how to draw.
    """

    name: str
    prepare: Callable[[GeneratorProblem], Run]
    layout: str = PIXELS
    compiled: bool = False
    seeded: bool = False
    unavailable: str | None = None

    def adapt(self, problem: GeneratorProblem) -> GeneratorProblem:
        """The problem, ready to be drawn."""
        with torch.no_grad():
            return dataclasses.replace(problem, run=self.prepare(problem))

    def function(self, problem: GeneratorProblem, noise: Noise) -> Tensor:
        """An image of an adapted problem."""
        assert problem.run is not None
        return problem.run(noise)

    def to_pixels(self, t: Tensor) -> Tensor:
        """An image as `[B, P, 3]`."""
        return t.flatten(2).transpose(1, 2) if t.dim() == 4 else t


def _grouped_conv(name: str, layout: str, draw: Callable[..., Tensor], compiled: bool) -> GeneratorProvider:
    last = layout == CHANNELS_LAST

    def prepare(p: GeneratorProblem) -> Run:
        net = generator_rivals.prepare_planes(p, last)
        case = p.case
        fixed = (case.dtype, case.config.rgb_layers, case.config.mapping_lr_mul, case.on_table_grid, last)
        return lambda noise: draw(net, p.z, *fixed, noise)

    return GeneratorProvider(name, prepare, layout, compiled)


def _bmm(name: str, draw: Callable[..., Tensor], compiled: bool) -> GeneratorProvider:
    def prepare(p: GeneratorProblem) -> Run:
        net = generator_rivals.prepare_pixels(p)
        fixed = (p.case.dtype, p.case.config.rgb_layers, p.case.on_table_grid)
        return lambda noise: draw(net, p.z, *fixed, noise, compiled)

    return GeneratorProvider(name, prepare, PIXELS, compiled)


def generator(problem: GeneratorProblem, backend: str, dtype: torch.dtype | None = None) -> Generator:
    """`cips.Generator` on a problem's very parameters: what changes there changes here."""
    with torch.device("meta"):
        found = Generator(problem.case.config, dtype=dtype, backend=backend)
    found.load_state_dict(problem.state, assign=True)
    return found.requires_grad_(False).eval()


def _noise(problem: GeneratorProblem, noise: Noise) -> Any:
    return "off" if noise is None else problem.seed if isinstance(noise, str) else noise


def _size(problem: GeneratorProblem) -> tuple[int, int] | None:
    return None if problem.coords is not None else (problem.case.height, problem.case.width)


def _ours(backend: str) -> Callable[[GeneratorProblem], Run]:
    def prepare(p: GeneratorProblem) -> Run:
        drawn = generator(p, backend, p.case.dtype)
        size = _size(p)
        return lambda noise: drawn(p.z, p.coords, size=size, noise=_noise(p, noise))

    return prepare


def _sampler(p: GeneratorProblem) -> Run:
    from cips import Sampler

    drawn = Sampler(generator(p, "auto", p.case.dtype), p.case.batch, coords=p.coords, size=_size(p))
    return lambda noise: drawn(p.z, noise=_noise(p, noise))


def _why_no_sampler() -> str | None:
    try:
        from cips import Sampler  # noqa: F401
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _compile(function: Callable[..., Tensor], mode: str | None = None) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def build(name: str, device: torch.device, dtype: torch.dtype, planes: str = PLANES) -> GeneratorProvider:
    """The provider of that name; arguments as in `providers.build`."""
    if name == "grouped_conv":
        return _grouped_conv(name, planes, generator_rivals.grouped_conv, False)
    if name == "grouped_conv_compiled":
        return _grouped_conv(name, planes, _compile(generator_rivals.grouped_conv), True)
    if name == "bmm":
        return _bmm(name, generator_rivals.bmm, False)
    if name in ("bmm_compiled", "bmm_autotuned"):
        mode = "max-autotune-no-cudagraphs" if name == "bmm_autotuned" else None
        return _bmm(name, _compile(generator_rivals.bmm, mode), True)
    if name in GENERATOR_ONLY:
        return GeneratorProvider(name, _sampler, seeded=True, unavailable=_why_no_sampler())
    if name not in BACKENDS:
        raise ValueError(f"provider: expected one of {', '.join(NAMES)}, got {name!r}")
    return GeneratorProvider(name, _ours(name), seeded=True, unavailable=why_not(name, device, dtype))
