"""Is it right? Outputs and gradients of a provider against the float64 oracle, before anything is timed.

The provider runs at the very size that is timed, with the same compiled code. Outputs are compared on a
random sample of pixels, and the gradient given to the output is zero elsewhere, so every gradient depends on
those pixels alone: the oracle needs only them, while a provider that leaves pixels out, reads what nothing
wrote, or overflows an index still fails.

The measure is `||a - oracle|| / ||oracle||`, for the output and for each kind of gradient. A provider passes
where each is at most twice the error of the plain eager formulation (`rivals.plain`) in the same dtype on the
same numbers. Where that error is rounding alone, in float32 sums that PyTorch happens to take pairwise, it is
counted as `FLOOR` units of rounding: to add the same numbers in another order is no fault. In half precision the
rule needs layers of some hundred channels, over which signs turned near zero average out: at 512 every right
formulation stays within 1.2 times the eager error, at 32 a right one may exceed it twice.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import FORWARD, TRAINING, Problem
from cips_kernels import noise as counter_noise
from cips_kernels import reference
from cips_kernels.testing import EAGER_FACTOR, poisoned_empty, relative_error
from providers import PLAIN, Provider
from rivals import GAIN, SLOPE

FLOOR = 4.0  # machine epsilons of the accumulation dtype
OFF, GIVEN, DRAWN = "off", "given", "drawn"
OUTPUT = "output"
_LARGE = 512  # elements
_SCALARS = ("strengths", "rgb_biases")


@dataclass(frozen=True)
class Verdict:
    """The outcome for one mode: the worst error beside the eager one of the same quantity.

    `error_eager` counts as `FLOOR` roundings at least; `measured_eager` is what it really was.
    """

    error: float
    error_eager: float
    measured_eager: float
    quantity: str
    ok: bool

    def __str__(self) -> str:
        relation = "within" if self.ok else "above"
        limit = f"{EAGER_FACTOR:g}x the eager {self.error_eager:.2e}"
        return f"{self.quantity}: error {self.error:.2e}, {relation} {limit}"


Tensors = dict[str, list[Tensor]]


def gradients(problem: Problem, output: Tensor, grad: Tensor) -> Tensors:
    """Gradients by kind, `x` among them; zeros where the output does not depend (strengths without noise)."""
    leaves = problem.leaves
    found = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    flat = iter(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found))
    first: Tensors = {} if problem.x is None else {"x": [next(flat)]}
    return first | {kind: [next(flat) for _ in group] for kind, group in problem.parameters.items()}


def by_quantity(output: Tensor, grads: Tensors) -> Tensors:
    """What is compared, by name: the output and every gradient, the small ones in company.

    A large tensor stands by itself, since in half precision the gradients of a deep stack are so noisy (signs
    turned near zero) that a layer's missing one would drown in the norm of all. The relative error of a few
    numbers is a matter of luck: all small ones of a kind share a norm, and the strengths' scalars share it with
    the biases', which are sums of the same sort.
    """
    found: Tensors = {OUTPUT: [output]}
    for kind, group in grads.items():
        if kind in _SCALARS:
            found[kind] = grads["biases"] + group
            continue
        for i, t in enumerate(group):
            found.setdefault(f"{kind}[{i}]" if t.numel() >= _LARGE else kind, []).append(t)
    return found


@dataclass(frozen=True)
class _Setting:
    """One choice of noise: the gradient given on the sample, what the oracle says, and the eager errors."""

    grad: Tensor
    expected: Tensors
    eager: dict[str, float]


class Checker:
    """Checks providers on one problem.

    Args:
        problem: at full size, pixels first.
        sample: pixels compared, at most.
        seed: of the choice of pixels.
    """

    def __init__(self, problem: Problem, sample: int, seed: int = 0) -> None:
        self.problem = problem
        pixels = problem.case.pixels
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.arange(pixels)
        if sample < pixels:
            ends = torch.tensor([0, pixels - 1])  # where tiles are cut off
            chosen = torch.cat([torch.randperm(pixels, generator=draw)[:sample], ends]).unique()
        self.chosen = chosen.to(problem.grad.device)
        self._settings: dict[str, _Setting] = {}
        sums = torch.float64 if problem.case.dtype == torch.float64 else torch.float32
        self._floor = FLOOR * torch.finfo(sums).eps

    # --- the sample -----------------------------------------------------------------------------------------

    def _sampled(self, problem: Problem, noise: Tensor | None) -> tuple[Problem, Tensor | None]:
        """The problem on the chosen pixels alone, leaves of its own, and its noise."""
        if problem.x is None:
            return problem, None
        case = dataclasses.replace(problem.case, height=1, width=self.chosen.numel())
        x = problem.x.detach()[:, self.chosen].requires_grad_()
        small = dataclasses.replace(problem, case=case, x=x, grad=problem.grad[:, self.chosen])
        return small, None if noise is None else noise[:, :, self.chosen]

    def _setting(self, name: str) -> _Setting:
        if name not in self._settings:
            self._settings[name] = self._make(name)
        return self._settings[name]

    def _noise(self, name: str) -> Tensor | None:
        problem = self.problem
        if name == OFF or problem.x is None:
            return None
        if name == GIVEN:
            return problem.noise
        layers = range(len(problem.weights))
        sizes = (problem.case.batch, problem.case.pixels)
        return torch.stack([counter_noise.normal(problem.seed, layer, *sizes) for layer in layers])

    def _make(self, name: str) -> _Setting:
        small, noise = self._sampled(self._problem(name), self._noise(name))
        expected, grad = oracle(small, noise)
        rounded = None if noise is None else noise.to(small.case.dtype)
        output = PLAIN.function(small, rounded)
        eager = by_quantity(output.detach(), gradients(small, output, grad))
        return _Setting(grad, expected, {key: relative_error(eager[key], expected[key]) for key in eager})

    def _problem(self, name: str) -> Problem:
        return self.problem.without_noise() if name == OFF else self.problem

    # --- a provider -----------------------------------------------------------------------------------------

    def settings(self, provider: Provider) -> tuple[str, ...]:
        """The noise a provider is checked with; compiled code only as it is timed, strengths zero."""
        if self.problem.x is None:
            return (OFF,)
        return (OFF,) if provider.compiled else (OFF, GIVEN, DRAWN) if provider.seeded else (OFF, GIVEN)

    def check(self, provider: Provider, mode: str) -> Verdict:
        """Run a provider and judge it by its worst quantity; exceptions of the provider pass through."""
        worst: Verdict | None = None
        for name in self.settings(provider):
            setting = self._setting(name)
            # whoever allocates through Python starts from NaN, so that an element left unwritten shows
            with poisoned_empty() if provider.seeded else nullcontext():
                got = self._run(provider, name, setting, mode)
            for quantity, tensors in got.items():
                if quantity == "strengths" and name == OFF:
                    continue  # zero in the oracle; the gradient of noise that is drawn means nothing
                expected = setting.expected[quantity]
                error, measured = relative_error(tensors, expected), setting.eager[quantity]
                eager = max(measured, self._floor)
                ok = error <= EAGER_FACTOR * eager
                verdict = Verdict(error, eager, measured, f"{quantity}, noise {name}", ok)
                if worst is None or _excess(verdict) > _excess(worst):
                    worst = verdict
        assert worst is not None
        return worst

    def _run(self, provider: Provider, name: str, setting: _Setting, mode: str) -> Tensors:
        problem = self._problem(name)
        noise = {OFF: "fresh" if provider.compiled else None, GIVEN: problem.noise, DRAWN: "fresh"}[name]
        if problem.x is None:
            sample = slice(None)
            full = problem
        else:
            sample = (slice(None), self.chosen)
            grad = torch.zeros_like(problem.grad)
            grad[sample] = setting.grad
            full = dataclasses.replace(problem, grad=grad)
        adapted = provider.adapt(full)
        if mode == FORWARD:
            with torch.no_grad():
                return {OUTPUT: [provider.to_pixels(provider.function(adapted, noise))[sample]]}
        assert mode == TRAINING
        output = provider.function(adapted, noise)
        grads = gradients(adapted, output, adapted.grad)
        if "x" in grads:
            grad_x = provider.to_pixels(grads["x"][0])
            outside = grad_x.clone()
            outside[sample] = 0
            # elsewhere it is zero times a weight: anything else is a read of what nothing wrote
            stray = bool(outside.count_nonzero())
            grads["x"] = [grad_x[sample] * (math.nan if stray else 1)]
        return by_quantity(provider.to_pixels(output.detach())[sample], grads)


def _excess(verdict: Verdict) -> float:
    return verdict.error / verdict.error_eager


def oracle(problem: Problem, noise: Tensor | None) -> tuple[Tensors, Tensor]:
    """Output and gradients by quantity in float64, and the gradient that was given to the output.

    In float32 a leaky ReLU's argument may lie so near zero that rounding turns its sign, which makes an error
    a thousand times the usual one in whoever is unlucky: pixels with such an argument get no gradient. In
    half precision turned signs are part of every formulation's ordinary error.
    """
    case = problem.case

    def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.detach().double().requires_grad_() for t in tensors)

    kinds = {kind: double(group) for kind, group in problem.parameters.items()}
    wide = dataclasses.replace(problem, **kinds)
    grad = problem.grad.double()
    if case.name == "modulate":
        output = reference.modulate(wide.weights[0], wide.styles[0])
        return by_quantity(output.detach(), gradients(wide, output, grad)), problem.grad
    wide = dataclasses.replace(wide, x=problem.x.detach().double().requires_grad_())
    x, rgb = wide.x.expand(case.batch, -1, -1), None
    nearest = torch.full(x.shape[:2], math.inf, dtype=torch.float64, device=x.device)
    for layer, (weight, style, bias, strength) in enumerate(
        zip(wide.weights, wide.styles, wide.biases, wide.strengths)
    ):
        given = None if noise is None else noise[layer].double()
        x = reference.modfc(
            x, weight, style, bias, given, strength, layout="bpc", negative_slope=SLOPE, gain=GAIN
        )
        if layer in case.rgb_after:
            k = case.rgb_after.index(layer)
            rgb = reference.to_rgb(
                x, wide.rgb_weights[k], wide.rgb_styles[k], wide.rgb_biases[k], rgb, layout="bpc"
            )
        seen = x.detach()
        nearest = torch.minimum(nearest, torch.where(seen > 0, seen / GAIN, -seen / (GAIN * SLOPE)).amin(-1))
    output = x if rgb is None else rgb
    if case.dtype in (torch.float32, torch.float64):
        grad = grad * (nearest > 160 * torch.finfo(case.dtype).eps)[:, :, None]
    expected = by_quantity(output.detach(), gradients(wide, output, grad))
    return expected, grad.to(problem.grad.dtype)
