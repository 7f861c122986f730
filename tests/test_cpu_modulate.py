"""Modulated weights by themselves on the cpu backend, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips_kernels import cpu, functional, reference
from cips_kernels.testing import assert_close_as_eager, poisoned_empty, relative_error

EPS = 1e-8
SHAPES = [(1, 3, 1), (2, 5, 7), (1, 32, 16), (3, 33, 65), (5, 64, 48)]  # B, O, I
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_matrix(batch: int, outs: int, ins: int) -> tuple[Tensor, Tensor, Tensor]:
    """N `[B, O, I]`, weight `[O, I]` and style `[B, I]` in float32."""
    draw = torch.Generator().manual_seed(batch * 1000 + ins)
    n, weight, style = (
        torch.randn(s, generator=draw) for s in ((batch, outs, ins), (outs, ins), (batch, ins))
    )
    return n, weight, 1 + 0.5 * style


def doubles(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_weights(shape, dtype, demodulate):
    _, *given = random_matrix(*shape)
    options = dict(demodulate=demodulate, eps=EPS)
    with poisoned_empty():
        mods = cpu.modulate(*given, dtype=dtype, **options)
    assert mods.dtype == dtype and mods.is_contiguous()
    exact, eager = (
        reference.modulate(*tensors, dtype=to, **options)
        for tensors, to in ((doubles(given), torch.float64), (given, dtype))
    )
    assert_close_as_eager("M", mods, eager, exact)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gradients(shape, demodulate):
    given, options = random_matrix(*shape), dict(demodulate=demodulate, eps=EPS)
    with poisoned_empty():
        grads = cpu.modulate_backward(*given, **options)
    exact = reference.modulate_backward(*doubles(given), **options)
    for name, grad, eager, want in zip(
        ("dW", "ds"), grads, reference.modulate_backward(*given, **options), exact
    ):
        assert grad.is_contiguous()
        assert_close_as_eager(name, grad, eager, want)


def test_gradients_of_a_single_channel():
    """Demodulation leaves only the sign of a single weight: its gradient is next to nothing, as the oracle's is."""
    given = random_matrix(*SHAPES[0])
    for grad, want in zip(
        cpu.modulate_backward(*given, demodulate=True, eps=EPS),
        reference.modulate_backward(*doubles(given), demodulate=True, eps=EPS),
    ):
        torch.testing.assert_close(grad.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_what_cancels_cancels_number_by_number(batch):
    """N almost along M: nearly all of it is taken away, and the little that stays must keep its digits."""
    n, weight, style = random_matrix(batch, 256, 256)
    along = reference.modulate(weight.double(), style.double(), eps=EPS)
    given = ((30 * along + 0.1 * n).float(), weight, style)
    options = dict(demodulate=True, eps=EPS)
    exact = reference.modulate_backward(*doubles(given), **options)
    eager = reference.modulate_backward(*given, **options)
    for name, grad, bad, want in zip(("dW", "ds"), cpu.modulate_backward(*given, **options), eager, exact):
        assert_close_as_eager(name, grad, bad, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("demodulate", [True, False])
def test_through_the_operator(dtype, demodulate):
    """Autograd of the public function against that of the oracle; the gradient that comes in is not contiguous."""

    def gradients(function, to, **options) -> list[Tensor]:
        _, weight, style = random_matrix(3, 10, 12)
        leaves = [t.to(to).requires_grad_() for t in (weight.to(dtype), style.to(dtype))]
        mods = function(*leaves, demodulate=demodulate, **options)
        return list(torch.autograd.grad(mods.sum(0, keepdim=True).expand(2, -1, -1).sum(), leaves))

    exact = gradients(reference.modulate, torch.float64)
    allowed = 2 * max(relative_error(gradients(reference.modulate, dtype), exact), torch.finfo(dtype).eps)
    assert relative_error(gradients(functional.modulate, dtype, backend="cpu"), exact) <= allowed


def test_the_operator_takes_this_backend(monkeypatch):
    called = []
    for name in ("modulate", "modulate_backward"):
        function = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *a, name=name, function=function, **k: called.append(name) or function(*a, **k)
        )
    _, weight, style = random_matrix(2, 5, 7)
    functional.modulate(weight.requires_grad_(), style, backend="cpu").sum().backward()
    assert called == ["modulate", "modulate_backward"]


def test_an_image_of_nan_leaves_the_others_alone():
    n, weight, style = random_matrix(3, 33, 65)
    spoiled_style, spoiled_n = style.clone(), n.clone()
    spoiled_style[1] = spoiled_n[1] = torch.nan
    options = dict(demodulate=True, eps=EPS)
    clean, mods = (cpu.modulate(weight, s, dtype=torch.float32, **options) for s in (style, spoiled_style))
    assert mods[1].isnan().all() and torch.equal(mods[::2], clean[::2])
    (_, clean_ds), (_, ds) = (cpu.modulate_backward(g, weight, style, **options) for g in (n, spoiled_n))
    assert ds[1].isnan().all() and torch.equal(ds[::2], clean_ds[::2])
