"""The error measure and the poison, on which other tests stand: they must see what is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from cips_kernels import functional, reference
from cips_kernels.testing import (
    allowed_error,
    assert_close_as_eager,
    poisoned_empty,
    random_stack,
    relative_error,
)


def test_relative_error():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact.float(), exact) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(2 * exact, exact) == pytest.approx(1.0)
    assert relative_error([exact[:1], exact[1:] + 0.5], [exact[:1], exact[1:]]) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 0.3]), torch.zeros(2)) == pytest.approx(0.3)
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    for bad in (math.nan, math.inf):
        assert relative_error(torch.tensor([3.0, bad]), exact) == math.inf
    with pytest.raises(ValueError, match="expected the shape of exact"):
        relative_error(torch.zeros(2, 1), exact)


def test_the_rule():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = exact.to(torch.bfloat16)
    error = relative_error(eager, exact)
    assert allowed_error(eager, exact) == pytest.approx(2 * max(error, 2**-7))
    assert_close_as_eager("y", eager, eager, exact)
    wrong = eager.clone()
    wrong[[17, 40]] = torch.tensor([math.nan, 9.0], dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"y: relative RMS error inf.*largest difference at \[17\]: nan"):
        assert_close_as_eager("y", wrong, eager, exact)
    with pytest.raises(AssertionError, match=r"allowed .* \(2 times eager's\)"):
        assert_close_as_eager("y", eager * 1.05, eager, exact)
    with pytest.raises(AssertionError, match="expected torch.bfloat16, got torch.float32"):
        assert_close_as_eager("y", eager.float(), eager, exact)


def test_poison():
    like = torch.ones(2, 3)
    makers = {
        "empty": lambda: torch.empty(2, 3),
        "empty_like": lambda: torch.empty_like(like),
        "empty_strided": lambda: torch.empty_strided((2, 3), (3, 1)),
        "new_empty": lambda: like.new_empty(2, 3),
        "new_empty_strided": lambda: like.new_empty_strided((2, 3), (3, 1)),
    }
    before = torch.empty, torch.Tensor.new_empty
    with pytest.raises(KeyError), poisoned_empty():
        for name, make in makers.items():
            assert make().isnan().all(), name
        assert like.new_empty(2, dtype=torch.bfloat16).isnan().all()
        assert torch.empty(2, dtype=torch.int64).shape == (2,)
        raise KeyError
    assert (torch.empty, torch.Tensor.new_empty) == before
    assert "new_empty" not in vars(torch.Tensor)


def test_random_stack_is_what_it_says():
    case = random_stack(
        (4, 6, 5), (-1, 1), batch=3, pixels=7, skip=True, shared=True, dtype=torch.bfloat16, seed=2
    )
    shapes = {name: tuple(t.shape) for name, t in case.tensors().items()}
    assert shapes["x"] == (1, 7, 4) and shapes["noise"] == (2, 3, 7) and shapes["skip"] == (3, 7, 3)
    assert (
        shapes["weights[1]"] == (5, 6)
        and shapes["styles[1]"] == (3, 6)
        and shapes["rgb_weights[0]"] == (3, 4)
    )
    assert case.x.dtype == torch.bfloat16 and case.weights[0].dtype == torch.float32
    again = random_stack(
        (4, 6, 5), (-1, 1), batch=3, pixels=7, skip=True, shared=True, dtype=torch.bfloat16, seed=2
    )
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    leaves = case.leaves()
    assert all(t.requires_grad and t.is_leaf for t in leaves.tensors().values())
    assert not any(t.requires_grad for t in case.tensors().values())
    assert {t.dtype for t in case.cast(torch.float64).tensors().values()} == {torch.float64}
    for got, want in zip(
        case.call(functional.modfc_stack, backend="reference"), case.call(reference.modfc_stack)
    ):
        assert torch.equal(got, want)
