"""Layers with a sine in Triton's kernels: against the official formula in float64 by the rule of `cips_kernels.testing`
(at most twice the error of eager PyTorch), interpreted on a CPU with small shapes, compiled on a GPU with real ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton", reason="this machine has no triton")
import triton
import triton.language as tl

import grouped
from cips_kernels import Encoding, FusedModFCStack, PreparedStack, functional, ops, reference
from cips_kernels.arguments import stack_call
from cips_kernels.spec import StackGrads, StackSpec
from cips_kernels.testing import EAGER_FACTOR, StackCase, poisoned_empty, random_stack, relative_error
from cips_kernels.triton import config, descriptors, layers, waves
from cips_kernels.triton.order import in_order_of_outputs, in_order_of_sums
from cips_kernels.triton.waves import sin_cos
from official_formulas import sine

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
KINDS = ["sin", "sinrelu"]
NAMES = (
    "x", "skip", "noise", "weights", "styles", "biases", "noise_strengths", "rgb_weights", "rgb_styles", "rgb_biases",
)  # fmt: skip


def published(case: StackCase, kind: str, slope: float = 0.2) -> tuple[Tensor | None, Tensor | None]:
    def tail(y: Tensor) -> Tensor:
        if kind == "sin" or slope == 0.2:
            return sine(y, kind)
        return torch.cat((F.leaky_relu(y[:, ::2], slope), torch.sin(y[:, 1::2])), 1) * math.sqrt(2)

    return case.call(grouped.stack, tail=tail)


def differentiate(case: StackCase, run, only: Sequence[str] = NAMES) -> dict[str, list[Tensor]]:
    """Outputs and gradients by name, of `run(case)`; a kind's tensors together, so that no lone scalar decides by luck."""
    leaves = case.map(
        lambda name, t: t.detach().clone().requires_grad_(name in only and t.is_floating_point())
    )
    outputs = [out for out in run(leaves) if out is not None]
    generator = torch.Generator().manual_seed(99)
    sent = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    torch.autograd.backward(outputs, sent)
    found = {f"output {k}": [out.detach()] for k, out in enumerate(outputs)}
    for name in only:
        value = getattr(leaves, name)
        tensors = value if isinstance(value, list) else [value]
        if tensors and all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
            # both are sums over all pixels; a strength alone is one number, whose rounding is luck
            key = "biases" if name == "noise_strengths" and "biases" in only else name
            found.setdefault(key, []).extend(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors)
    return found


def assert_rule(found: dict, eager: dict, exact: dict, kinks: bool = False) -> None:
    """`kinks`: gradients may be but roughly right, a tenth. Of leaky ReLUs a few are decided by the sign of a sum that rounding
    takes across zero, in eager PyTorch at other places: where they are few, their errors have nothing to do with one another."""
    assert found.keys() == exact.keys() == eager.keys()
    for name in exact:
        error, rough = relative_error(found[name], exact[name]), relative_error(eager[name], exact[name])
        least = 0.1 if kinks and not name.startswith("output") else 4 * torch.finfo(torch.float32).eps
        allowed = max(EAGER_FACTOR * rough, least)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check(*cases: StackCase, kind: str, backend: str = "triton") -> None:
    """The rule for every output and gradient over all cases, on memory that was poisoned, and the same bits in a second run;
    that of gradients with a leaky ReLU without a kink."""
    for slope in (0.2,) if kind == "sin" else (0.2, 1.0):
        joined: tuple[dict, dict, dict] = ({}, {}, {})
        for case in cases:
            for all_, one in zip(joined, _compared(case, kind, slope, backend)):
                for name, tensors in one.items():
                    all_.setdefault(name, []).extend(tensors)
        assert_rule(*joined, kinks=kind == "sinrelu" and slope != 1)


def _compared(case: StackCase, kind: str, slope: float, backend: str) -> tuple[dict, dict, dict]:
    """By the backend, by eager PyTorch, and in float64."""

    def by(name: str):
        return lambda c: c.call(functional.modfc_stack, activation=kind, negative_slope=slope, backend=name)

    truth = by("reference") if isinstance(case.noise, int) else lambda c: published(c, kind, slope)
    exact, eager = differentiate(case.cast(torch.float64), truth), differentiate(case, by("reference"))
    with poisoned_empty():
        found, again = differentiate(case, by(backend)), differentiate(case, by(backend))
    for name, tensors in found.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, again[name])), f"{name}: two runs differ"
    return found, eager, exact


@pytest.mark.skipif(CUDA, reason="a GPU of capability 9.0 takes these kernels by itself")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("widths", "rgb_after", "options"),
    [((64, 96, 32, 264), (0, 2), dict(batch=3, pixels=140)), ((72, 40, 136), (-1,), dict(batch=1, pixels=33, noise=3))],
    ids=["aligned", "odd"],
)
def test_kernels_with_descriptors(widths: tuple, rgb_after: tuple, options: dict, kind: str, monkeypatch) -> None:
    """Interpreted as if on a GPU that has them; the hardware's sine alone is another's."""
    for module in (config, descriptors, layers):
        monkeypatch.setattr(module, "device_limits", lambda _device: (227 * 1024, (9, 0), 4))
    monkeypatch.setattr(waves, "libdevice", SimpleNamespace(fast_sinf=_slow_sine, fast_cosf=_slow_cosine))
    served, plain = [], descriptors.dgrad
    monkeypatch.setattr(descriptors, "dgrad", lambda *a: (served.append(a), plain(*a)))
    check(random_stack(widths, rgb_after, dtype=FLOAT16, **options), kind=kind)
    assert served


@triton.jit
def _slow_sine(y):
    sin, _ = sin_cos(y, False)
    return sin


@triton.jit
def _slow_cosine(y):
    _, cos = sin_cos(y, False)
    return cos


def test_slope_and_gain() -> None:
    case = random_stack((33, 17, 32), (0, 1), batch=2, pixels=40, device=DEVICE)
    options = {"activation": "sinrelu", "negative_slope": 0.7, "gain": 3.0}

    def by(name: str):
        return lambda c: c.call(functional.modfc_stack, backend=name, **options)

    exact = differentiate(case.cast(torch.float64), by("reference"))
    assert_rule(differentiate(case, by("triton")), differentiate(case, by("reference")), exact)


SMALL = [
    # widths, rgb_after, options
    ((32, 48, 16), (0, 1), dict(batch=3, pixels=20)),
    ((33, 17, 50, 19), (-1, 1, 1, 2), dict(batch=3, pixels=130, shared=True, skip=True)),
    ((40, 131), (0,), dict(batch=1, pixels=129, channels=1)),
    ((16, 5, 6, 17), (), dict(batch=1, pixels=150, noise=None)),
    ((20, 24, 24), (1,), dict(batch=1, pixels=33, channels=6)),
]  # with given noise: drawn, its last bits are the kernel's own, and eager PyTorch has the truth's


# the interpreter cuts float32 to bfloat16 instead of rounding it: that dtype is for the GPU
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("widths", "rgb_after", "options"), SMALL, ids=lambda v: str(v).replace(" ", ""))
def test_small_stacks(widths: tuple, rgb_after: tuple, options: dict, kind: str, dtype: torch.dtype) -> None:
    check(random_stack(widths, rgb_after, device=DEVICE, dtype=dtype, **options), kind=kind)


REAL = [
    ((512, 512, 256, 128, 64, 32), (1, 3, 4), dict(batch=3, pixels=1000)),
    ((1024, 512, 512), (1,), dict(batch=2, pixels=4096, shared=True)),
    ((1024, 512, 512), (0, 1), dict(batch=1, pixels=65536, noise=5)),
    ((1024, 1000, 1024), (1,), dict(batch=3, pixels=257)),
    ((513, 511, 129), (0, 1), dict(batch=3, pixels=127, skip=True)),
    ((512, 264, 136), (1,), dict(batch=1, pixels=1025)),
    ((64, 96, 40), (1,), dict(batch=2, pixels=128, channels=20)),
    ((512, 512, 512), (), dict(batch=3, pixels=300, noise=None)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("widths", "rgb_after", "options"), REAL + SMALL, ids=lambda v: str(v).replace(" ", ""))
def test_real_stacks(
    widths: tuple, rgb_after: tuple, options: dict, kind: str, dtype: torch.dtype, backend: str
) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        draws = 4 if options["pixels"] < 100 else 1  # a handful of numbers has no average error
        cases = [random_stack(widths, rgb_after, device=DEVICE, dtype=dtype, seed=k, **options) for k in range(draws)]
        check(*cases, kind=kind, backend=backend)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_paper_stack(kind: str) -> None:
    stack = random_stack((1024,) + 15 * (512,), tuple(range(2, 15, 2)), batch=2, pixels=2048, device=DEVICE)
    check(stack.cast(BFLOAT16), kind=kind)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_tens_of_radians(kind: str, dtype: torch.dtype) -> None:
    case = random_stack((48, 40, 24), (0, 1), batch=2, pixels=70, device=DEVICE)
    case = case.map(lambda name, t: 40 * t if name in ("x", "biases", "noise_strengths") else t)
    check(case.cast(dtype), kind=kind)


@pytest.mark.parametrize("save", ["some", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_does_not_matter(kind: str, save: str) -> None:
    case = random_stack((24, 33, 16, 20, 17, 16, 24), (1, 3, 5), batch=3, pixels=40, device=DEVICE)
    exact = differentiate(case.cast(torch.float64), lambda c: published(c, kind))
    eager, found = (
        differentiate(case, lambda c, b=b, s=s: c.call(functional.modfc_stack, activation=kind, backend=b, save=s))
        for b, s in (("reference", "all"), ("triton", save))
    )
    assert_rule(found, eager, exact)


@pytest.mark.parametrize("only", [("x",), ("weights",), ("biases",), ("noise",), ("rgb_weights", "styles")], ids=str)
def test_some_gradients_alone(only: tuple[str, ...]) -> None:
    case = random_stack((33, 17, 32), (0, 1), batch=2, pixels=40, device=DEVICE)

    def run(c: StackCase):
        return c.call(functional.modfc_stack, activation="sinrelu", backend="triton")

    every, some = differentiate(case, run), differentiate(case, run, only)
    for name, tensors in some.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, every[name])), name


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_same_bits_with_and_without_gradients(kind: str) -> None:
    case = random_stack((33, 48, 17), (0, 1), batch=2, pixels=40, device=DEVICE, dtype=FLOAT16)
    kept = case.leaves().call(functional.modfc_stack, activation=kind, backend="triton")
    with torch.no_grad():
        passing = case.call(functional.modfc_stack, activation=kind, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(kept, passing))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_order(kind: str) -> None:
    def norms(case: StackCase, backend: str) -> list[Tensor]:
        leaves = list(case.tensors().values())
        features, rgb = case.call(functional.modfc_stack, activation=kind, backend=backend)
        grads = torch.autograd.grad(features.square().sum() + (rgb**3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    case = random_stack((17, 16, 19), (0, 1), batch=2, pixels=20, device=DEVICE, seed=3)
    exact = norms(case.cast(torch.float64).leaves(), "reference")
    eager, found = (norms(case.leaves(), backend) for backend in ("reference", "triton"))
    assert relative_error(found, exact) <= EAGER_FACTOR * relative_error(eager, exact)


# --- what serves, and what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_formulation_is_never_reached(kind: str, monkeypatch) -> None:
    def reached(*_arguments, **_options):
        raise AssertionError("the reference formulation")

    for name in ("stack_layers", "stack_gradients", "activate"):
        monkeypatch.setattr(reference, name, reached)
    stack = FusedModFCStack([8, 6, 5, 4], 7, activation=kind, noise=True, backend="triton").to(DEVICE)
    encoding = Encoding(
        *(torch.randn(shape, device=DEVICE) for shape in ((3, 2), (3,), (4, 6, 5))), None, (4, 6)
    )
    style = torch.randn(2, 7, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = stack(encoding, style, 3)
        kept.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(stack(encoding, style, 3), kept.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(PreparedStack(stack)(encoding, style, 3), kept.detach(), rtol=1e-5, atol=1e-5)
    assert stack.layers[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_serves_a_stack(kind: str, backend: str) -> None:
    spec = StackSpec((64, 64), (0,), activation=kind)
    where = {"triton": "cips_kernels.triton.stack", "cuda": "cips_kernels.cuda_stack"}
    assert ops._module(backend, spec).__name__ == where[backend]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert ops._module(backend, replace(spec, blocks=((0, 0),))).__name__ == "cips_kernels.sines"
    assert ops._module("cpu", spec).__name__ == "cips_kernels.sines"


@pytest.mark.parametrize("save", ["all", "some", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_are_registered_right(kind: str, save: str) -> None:
    # widths fill their places, so that no gap is left uninitialised in what is compared
    case = random_stack((16, 32, 16), (0, 1), batch=2, pixels=64, skip=True, device=DEVICE, noise=None)
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k), activation=kind)
    leaves = [t if t is None else t.detach().requires_grad_(save != "none" and t.is_floating_point()) for t in inputs]
    arguments = (*leaves, *ops._spec_values(spec), True, save, "triton")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.cips_kernels.modfc_stack.default, arguments, test_utils=checks)


# --- the pieces -----------------------------------------------------------------------------------------------------


@triton.jit
def _sin_cos_kernel(y_ptr, sin_ptr, cos_ptr, count, FAST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sin, cos = sin_cos(tl.load(y_ptr + at, mask=at < count, other=0.0), FAST)
    tl.store(sin_ptr + at, sin, mask=at < count)
    tl.store(cos_ptr + at, cos, mask=at < count)


def sines_of(y: Tensor, fast: bool) -> tuple[Tensor, Tensor]:
    sin, cos = torch.empty_like(y), torch.empty_like(y)
    _sin_cos_kernel[(triton.cdiv(len(y), 1024),)](y, sin, cos, len(y), FAST=fast, BLOCK=1024)
    return sin, cos


@pytest.mark.parametrize("most", [0.1, 3.0, 100.0, 25_000.0])
@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_sine_and_cosine(most: float, fast: bool) -> None:
    y = torch.linspace(-most, most, 50_001, device=DEVICE)
    allowed = 2**-20 + most * 2**-22 if fast else 2e-7
    for found, exact in zip(sines_of(y, fast), (y.double().sin(), y.double().cos())):
        assert (found.double() - exact).abs().max() <= allowed


def test_sine_and_cosine_of_what_has_none_that_is_known() -> None:
    large = torch.tensor([1e7, -3e9, 1e20, -3e38], device=DEVICE)
    for found in sines_of(large, False):
        assert (found.abs() <= 1.001).all()
    for found in sines_of(torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE), False):
        assert found.isnan().all()


def test_a_bad_number_spoils_its_own_pixel() -> None:
    case = random_stack((16, 24, 16), (1,), batch=2, pixels=9, device=DEVICE, noise=None)
    good = case.call(functional.modfc_stack, activation="sin", backend="triton")
    case.x[1, 4, 7] = torch.nan
    for bad, fine in zip(case.call(functional.modfc_stack, activation="sin", backend="triton"), good):
        spoilt = bad.isnan()
        assert spoilt[1, 4].all() and spoilt.sum() == bad.shape[2]
        assert torch.equal(bad[~spoilt], fine[~spoilt])


@pytest.mark.parametrize("channels", [1, 2, 7, 8])
def test_rows_are_put_in_the_order_of_outputs_and_back(channels: int) -> None:
    case = random_stack((5, channels, 3), (0,), batch=1)
    inputs, spec = case.call(lambda x, *a, layout, **k: stack_call(x, *a, **k), activation="sinrelu")
    sorted_ = in_order_of_outputs(inputs, spec)
    rows = case.weights[0]
    assert torch.equal(sorted_.weights[: rows.numel()].view_as(rows), torch.cat((rows[::2], rows[1::2])))
    bias = case.biases[0]
    assert torch.equal(sorted_.biases[:channels], torch.cat((bias[::2], bias[1::2])))
    empty = torch.empty(0)
    back = in_order_of_sums(StackGrads(empty, sorted_.weights, empty, sorted_.biases, empty, None), spec, 1)
    assert torch.equal(back.weights, inputs.weights) and torch.equal(back.biases, inputs.biases)
