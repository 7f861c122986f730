"""The mapping network as one operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips import Generator, GeneratorConfig
from cips_kernels import cuda, functional, vectors
from cips_kernels.testing import assert_close_as_eager, poisoned_empty


def draw(vectors: int, dim: int, layers: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim + layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return 3 * normal(vectors, dim), normal(layers, dim, dim) * (2 / dim) ** 0.5, 0.2 * normal(layers, dim)


def test_it_is_the_generators_mapping():
    """Against the module, layer by layer."""
    g = Generator(GeneratorConfig(size=(4, 4), style_dim=32, mapping_layers=3, widths=(8,), fourier_features=4, table_features=4))
    with torch.no_grad():
        for layer in list(g.mapping)[1:]:
            layer.bias.normal_()
        weights, biases = zip(*(layer.effective() for layer in list(g.mapping)[1:]))
        z = torch.randn(5, 32)
        found = functional.mapping(z, torch.stack(weights), torch.stack(biases))
        torch.testing.assert_close(found, g.mapping(z), rtol=1e-5, atol=1e-6)


def test_gradients():
    leaves = tuple(t.double().requires_grad_() for t in draw(2, 4, 2))
    assert torch.autograd.gradcheck(lambda *t: functional.mapping(*t), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: functional.mapping(*t), leaves)


def test_opcheck():
    torch.library.opcheck(torch.ops.cips_kernels.mapping.default, (*draw(2, 4, 2), 0.2, "reference"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": torch.zeros(3)}, ValueError, r"z: expected \[N, D\]"),
        ({"z": torch.zeros(3, 8).half()}, TypeError, "z: expected float32 or float64"),
        ({"weights": torch.zeros(2, 8, 9)}, ValueError, r"weights: expected \[L, D, D\] = \[any, 8, 8\]"),
        ({"weights": torch.zeros(2, 8, 8).double()}, TypeError, "weights: expected float32"),
        ({"biases": torch.zeros(3, 8)}, ValueError, r"biases: expected \[L, D\] = \[2, 8\]"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope: expected a finite number"),
        ({"backend": "metal"}, ValueError, "backend: expected auto"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"z": torch.zeros(3, 8), "weights": torch.zeros(2, 8, 8), "biases": torch.zeros(2, 8), **change}
    with pytest.raises(error, match=words):
        functional.mapping(**arguments)


def test_says_what_the_kernel_does_not_take():
    assert "not in torch.float64" in cuda.why_not_mapping(torch.zeros(1, 64).double())
    assert "not a multiple of 32 up to 512" in cuda.why_not_mapping(torch.zeros(1, 544))
    assert cuda.why_not_mapping(torch.zeros(1, 512)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("vectors", [1, 3, 16, 17, 40])
@pytest.mark.parametrize(("dim", "layers"), [(512, 8), (32, 1), (96, 2), (480, 3), (128, 5)])
def test_kernel(vectors: int, dim: int, layers: int) -> None:
    ok, reason = cuda.available()
    if not ok:
        pytest.skip(reason)
    arguments = draw(vectors, dim, layers, "cuda")
    with poisoned_empty():
        found = functional.mapping(*arguments, backend="cuda")
    eager = functional.mapping(*arguments, backend="reference")
    exact = functional.mapping(*(t.double() for t in arguments), backend="reference")
    assert_close_as_eager("w", found, eager, exact)
    assert torch.equal(found, functional.mapping(*arguments, backend="cuda"))
    # a vector's w does not depend on its neighbours
    assert torch.equal(functional.mapping(arguments[0][-1:], *arguments[1:]), found[-1:])


@pytest.mark.gpu
def test_vectors_at_odd_addresses() -> None:
    """The kernels read 16 bytes at a time; the operators see to it."""
    ok, reason = cuda.available()
    if not ok:
        pytest.skip(reason)
    z, weights, biases = draw(2, 64, 2, "cuda")
    odd = torch.cat([z.new_zeros(1), z.flatten()])[1:].view_as(z)
    assert odd.data_ptr() % 16 != 0
    assert torch.equal(functional.mapping(odd, weights, biases), functional.mapping(z, weights, biases))
    assert torch.equal(vectors.affine(odd, weights[0], biases[0], z), vectors.affine(z, weights[0], biases[0], z))


def draw_affine(vectors: int, dim: int, rows: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim + rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return normal(vectors, dim), normal(rows, dim), normal(rows), normal(3, 100)


def test_affine_is_a_product_and_a_bias():
    x, weight, bias, upcoming = draw_affine(2, 12, 5)
    torch.testing.assert_close(vectors.affine(x, weight, bias, upcoming), torch.nn.functional.linear(x, weight, bias))
    torch.library.opcheck(torch.ops.cips_kernels.affine.default, (x, weight, bias, upcoming, None, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize(("dim", "rows"), [(512, 11_776), (32, 1), (96, 31), (480, 33), (128, 1000)])
@pytest.mark.parametrize("upcoming", [0, 1, 5_000_001])
def test_affine_kernel(count: int, dim: int, rows: int, upcoming: int) -> None:
    ok, reason = cuda.available()
    if not ok:
        pytest.skip(reason)
    x, weight, bias, _ = draw_affine(count, dim, rows, "cuda")
    with poisoned_empty():
        found = cuda.affine(x, weight, bias, torch.zeros(upcoming, device="cuda", dtype=torch.uint8))
    exact = torch.addmm(bias.double(), x.double(), weight.double().t())
    assert_close_as_eager("y", found, torch.addmm(bias, x, weight.t()), exact)
    assert torch.equal(found, vectors.affine(x, weight, bias, x)), "the operator, and a second run"


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [False, True])
def test_affine_waits_for_the_mapping(overlaps: bool) -> None:
    """Launched to overlap or not; by itself also right behind a kernel that has just written its matrix. Every call has other
    vectors: those of the call before, which may lie where this one's will, would be wrong."""
    ok, reason = cuda.available()
    if not ok:
        pytest.skip(reason)
    z, weights, biases = draw(16, 512, 8, "cuda")
    _, weight, bias, upcoming = draw_affine(1, 512, 11_776, "cuda")
    tripled, given = 3 * weight, [z.roll(k, 1) for k in range(20)]
    expected = []
    for each in given:
        w = functional.mapping(each, weights, biases, backend="cuda")
        torch.cuda.synchronize()
        expected.append(vectors.affine(w, tripled, bias, upcoming))
        assert_close_as_eager("y", expected[-1], torch.addmm(bias, w, tripled.t()), torch.addmm(bias.double(), w.double(), tripled.double().t()))
    assert not torch.equal(expected[0], expected[1])
    for each, y in zip(given, expected):
        w = functional.mapping(each, weights, biases, backend="cuda")
        found = vectors.affine(w, tripled if overlaps else 3 * weight, bias, upcoming, weights if overlaps else None)
        assert torch.equal(found, y)
        del w, found
