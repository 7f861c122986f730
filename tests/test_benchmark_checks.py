"""The benchmark's check: the oracle is right, rivals pass, and a wrong provider is seen before it is timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmark_helpers import CPU, SmallCeilings, options, small, written_out

import modfc_bench  # isort: skip
import providers  # isort: skip
import report  # isort: skip
import rivals  # isort: skip
from cases import CASES, FORWARD, TRAINING, Problem, make_case, make_problem  # isort: skip
from checks import Checker, oracle  # isort: skip
from runner import Budget, Group, Outcome  # isort: skip

NUMBERS = ("ms", "ms_p20", "ms_p80", "tflops", "of_ceiling", "peak_mb")


@pytest.mark.parametrize("given", [False, True])
def test_oracle_agrees_with_the_formulas_written_out(given: bool) -> None:
    problem = make_problem(small(), CPU, 3)
    noise = problem.noise if given else None
    expected, _ = oracle(problem, noise)
    exact = written_out(problem, noise)
    assert (expected["output"][0] - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("for_compiler", [False, True])
def test_both_bmm_formulations_agree(for_compiler: bool) -> None:
    problem = make_problem(small("stack", torch.float64), CPU, 0)
    arguments = providers._arguments(problem)
    features, rgb = rivals.bmm(*arguments, problem.noise, for_compiler=for_compiler)
    exact = written_out(problem, problem.noise)
    assert (rgb - exact).norm() <= 1e-10 * exact.norm()
    assert features.shape == (2, 42, 32)


def test_noise_of_the_rivals_is_fresh_and_of_unit_variance() -> None:
    """With weights of zero and unit strength, what a layer adds is its noise."""
    problem = make_problem(
        make_case("layer", batch=2, height=64, width=64, dtype=torch.float32, channels=16), CPU, 0
    )
    problem = _with(
        problem,
        weights=(torch.zeros(16, 16),),
        biases=(torch.zeros(16),),
        strengths=(torch.tensor(1.0),),
    )
    for name, planes in (
        ("grouped_conv", providers.PLANES),
        ("grouped_conv", providers.CHANNELS_LAST),
        ("bmm", ""),
    ):
        provider = providers.build(name, CPU, torch.float32, planes)
        adapted = provider.adapt(problem)
        first, second = (provider.to_pixels(provider.function(adapted, "fresh")).detach() for _ in range(2))
        noise = torch.where(first > 0, first, first / 0.2) / math.sqrt(2)
        assert torch.allclose(noise, noise[:, :, :1].expand_as(noise)), (
            "one value for all channels of a pixel"
        )
        assert noise[:, :, 0].mean().abs() < 0.05 and (noise[:, :, 0].std() - 1).abs() < 0.05
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_rivals_pass_and_errors_belong_to_the_dtype(name: str, dtype: torch.dtype) -> None:
    # in bfloat16 near-zero arguments turn their signs, which averages out over many of them only
    size, channels = (7, 32) if dtype == torch.float32 else (16, 384)
    case = make_case(name, batch=2, height=size, width=size, dtype=dtype, channels=channels)
    checker = Checker(make_problem(case, CPU, 1), sample=size * size // 2)
    low, high = (1e-9, 1e-5) if dtype == torch.float32 else (1e-4, 0.3)
    for provider in ("grouped_conv", "bmm"):
        for planes in (providers.PLANES, providers.CHANNELS_LAST):
            verdict = checker.check(providers.build(provider, CPU, dtype, planes), TRAINING)
            assert verdict.ok, (provider, verdict)
            assert low < verdict.error < high


def test_every_gradient_is_compared() -> None:
    checker = Checker(make_problem(small(), CPU, 0), sample=64)
    setting = checker._setting("given")
    names = {"output", "x[0]", "styles", "biases", "strengths", "rgb_weights", "rgb_styles", "rgb_biases"}
    assert set(setting.expected) == set(setting.eager) == names | {f"weights[{i}]" for i in range(15)}
    assert [len(setting.expected[name]) for name in ("styles", "rgb_styles", "strengths")] == [15, 7, 30]
    assert all(float(t.norm()) > 0 for group in setting.expected.values() for t in group)


# --- a wrong provider ---------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _with(problem: Problem, **changes: object) -> Problem:
    return dataclasses.replace(problem, **changes)


def _unwritten(output: Tensor) -> Tensor:
    output = output.clone()
    output[:, -1] = math.nan
    return output


BROKEN: dict[str, Callable[[Callable, Problem, object], Tensor]] = {
    "output a hundredth too large": lambda f, p, n: f(p, n) * 1.01,
    "last pixel unwritten": lambda f, p, n: _unwritten(f(p, n)),
    "noise of layer 3 left out": lambda f, p, n: f(p, n * _mask(n, 3) if isinstance(n, Tensor) else n),
    "bias of layer 5 negated": lambda f, p, n: f(_with(p, biases=_changed(p.biases, 5, lambda b: -b)), n),
    "no gradient for a style": lambda f, p, n: f(
        _with(p, styles=_changed(p.styles, 7, lambda s: s.detach())), n
    ),
    "sign of a weight's gradient": lambda f, p, n: f(
        _with(p, weights=_changed(p.weights, 0, lambda w: Scaled.apply(w, -1.0))), n
    ),
    "input's gradient scaled": lambda f, p, n: f(_with(p, x=Scaled.apply(p.x, 1.001)), n),
    "a strength's gradient doubled": lambda f, p, n: f(
        _with(p, strengths=_changed(p.strengths, 14, lambda s: Scaled.apply(s, 2.0))), n
    ),
    "wrong shape": lambda f, p, n: f(p, n)[:, :-1],
}


def _mask(noise: Tensor, layer: int) -> Tensor:
    mask = torch.ones_like(noise)
    mask[layer] = 0
    return mask


def _changed(
    tensors: tuple[Tensor, ...], index: int, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    return tuple(change(t) if i == index else t for i, t in enumerate(tensors))


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_provider_is_reported_and_not_timed(fault: str) -> None:
    """Each fault alone is seen; it gets a row without a time, and is not called again after its check."""
    calls: list[str] = []
    right = providers.build("bmm", CPU, torch.float32)

    def function(problem: Problem, noise: object) -> Tensor:
        calls.append("timed" if noise == "fresh" else "checked")
        return BROKEN[fault](right.function, problem, noise)

    def build(name: str, *arguments: object) -> providers.Provider:
        return dataclasses.replace(right, name=name, function=function) if name == "broken" else right

    said: list[str] = []
    chosen = options(["bmm", "broken"], build, said)
    rows = Group(small(), chosen, SmallCeilings()).run(seconds=0.1).rows
    broken = {row["mode"]: row for row in rows if row["provider"] == "broken"}
    failed = broken[TRAINING]
    assert not failed["ok"] and failed["reason"]
    assert all(failed[key] is None for key in NUMBERS)
    assert any("broken FAILED" in line for line in said)
    if not broken[FORWARD]["ok"]:
        assert "timed" not in calls
    assert all(row["ok"] and row["ms"] > 0 for row in rows if row["provider"] == "bmm")
    text = report.terminal(rows)
    assert "broken: FAILED, not timed" in text
    assert modfc_bench.is_fault(failed) == (failed["error_eager"] is not None)


def test_whoever_raises_is_reported_and_the_others_go_on() -> None:
    right = providers.build("bmm", CPU, torch.float32)

    def raising(problem: Problem, noise: object) -> Tensor:
        raise RuntimeError("no C++ compiler\nand a long trace")

    def build(name: str, *arguments: object) -> providers.Provider:
        return (
            dataclasses.replace(right, name=name, function=raising, compiled=True) if name != "bmm" else right
        )

    rows = Group(small("layer"), options(["bmm_compiled", "bmm"], build), SmallCeilings()).run(0.1).rows
    assert [row["ok"] for row in rows] == [False, True, False, True]
    assert rows[0]["reason"] == "RuntimeError: no C++ compiler"
    assert not modfc_bench.is_fault(rows[0])


def test_what_does_not_fit_the_budget_is_left_out() -> None:
    chosen = options(["bmm", "bmm_compiled"])
    chosen.budget = Budget(40.0)
    group = Group(small("stack"), chosen, SmallCeilings())
    group.run(0.1)
    assert {row["provider"] for row in group.outcome.rows} == {"bmm"}
    assert [item["provider"] for item in group.outcome.left_out] == ["bmm_compiled"]
    chosen.budget = Budget(0.0)
    spent: Outcome = modfc_bench.measure([small("layer"), small("modulate")], chosen, SmallCeilings())
    assert not spent.rows
    assert {item["case"] for item in spent.left_out} == {"layer", "modulate"}
