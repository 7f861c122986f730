"""Fourier features and the coordinate table, against numpy and PyTorch's grid_sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cips import Generator, GeneratorConfig, grids
from cips.encodings import CoordinateEncoding, CoordinateTable, FourierFeatures


def test_fourier_features_are_the_sine_of_an_affine_map():
    torch.manual_seed(0)
    fourier = FourierFeatures(33).double()
    coords = torch.rand(50, 2) * 2 - 1
    b, bias = fourier.weight.detach().numpy(), fourier.bias.detach().numpy()
    expected = np.sin(coords.double().numpy() @ b.T + bias)
    np.testing.assert_allclose(fourier(coords).detach().numpy(), expected, rtol=0, atol=1e-14)


def test_fourier_features_start_as_in_the_official_code():
    torch.manual_seed(0)
    fourier = FourierFeatures(20_000)
    for values, bound in ((fourier.weight, math.sqrt(9 / 2)), (fourier.bias, 1 / math.sqrt(2))):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.99 * bound
        # of a uniform distribution
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_table_starts_normal_with_the_given_deviation():
    torch.manual_seed(0)
    for std in (1.0, 0.1):
        weight = CoordinateTable(64, 32, std).weight / std
        assert weight.mean().abs() < 0.02 and weight.std().item() == pytest.approx(1, rel=0.02)
        assert weight.pow(4).mean().item() == pytest.approx(3, rel=0.05), "of a normal distribution"


def sampled(table: CoordinateTable, coords: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """PyTorch's own bilinear lookup: `[P, C]`."""
    image = table.weight.permute(2, 0, 1)[None]
    out = F.grid_sample(
        image,
        coords.to(image)[None, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=align_corners,
    )
    return out[0, :, 0].T


@pytest.mark.parametrize("lookup, align_corners", [("exact", True), ("compat", False)])
@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 4), (2, 1)])
def test_lookup_is_bilinear_with_borders(lookup, align_corners, size):
    torch.manual_seed(1)
    table = CoordinateTable(6, size).double()
    coords = torch.rand(300, 2, dtype=torch.float64) * 3 - 1.5  # a third of them outside
    corners = torch.tensor([[-1.0, -1], [1, 1], [-1, 1], [1, -1]], dtype=torch.float64)
    coords = torch.cat((coords, corners))
    # "exact" takes what lies within float32's resolution of a grid point as the grid point
    torch.testing.assert_close(
        table(coords, lookup), sampled(table, coords, align_corners), rtol=0, atol=2e-5
    )
    away = table(coords, lookup) - sampled(table, coords, align_corners)
    assert away.abs().median() < 1e-12


def test_exact_lookup_of_a_grid_point_is_the_entry_itself():
    for count in [*range(1, 70), 100, 255, 256, 333, 1000, 1024, 2048]:
        table = CoordinateTable(1, (count, 3))
        found = table(grids.full(count, 3))
        assert torch.equal(found, table.weight), f"table of {count} rows"


def test_compat_lookup_shifts_as_the_official_code_does():
    # Pixels come to lie evenly between -1/2 and +1/2 off their entry, in both directions. For independent
    # entries of
    # variance 1 the integrals give the error's mean square 1 - 2 (3/4)^2 + (2/3)^2, and the variance (2/3)^2.
    torch.manual_seed(2)
    table = CoordinateTable(4, 256)
    own = grids.full(256, 256).flatten(0, 1)
    with torch.no_grad():
        found, truth = table(own, "compat"), table.own_grid()
    error = ((found - truth).square().mean() / truth.square().mean()).sqrt()
    assert error.item() == pytest.approx(0.565, abs=0.01)
    assert found.std().item() == pytest.approx(2 / 3, abs=0.01)


def test_columns_are_interpolated_before_what_lies_between_them():
    # the order of the operations, which every kernel shares bit for bit
    torch.manual_seed(8)
    table = CoordinateTable(5, (7, 9))
    coords = torch.rand(400, 2) * 2 - 1
    x, y = (coords[:, 0] + 1) * 4, (coords[:, 1] + 1) * 3
    column, row = x.floor().long(), y.floor().long()
    x, y = (x - column)[:, None], (y - row)[:, None]
    with torch.no_grad():
        above = [table.weight[row, column + i] for i in (0, 1)]
        below = [table.weight[row + 1, column + i] for i in (0, 1)]
        left, right = ((1 - y) * a + y * b for a, b in zip(above, below, strict=True))
        upper, lower = ((1 - x) * a + x * b for a, b in (above, below))
        found = table(coords)
    assert torch.equal(found, (1 - x) * left + x * right)
    other = (1 - y) * upper + y * lower
    assert not torch.equal(found, other), "the other order has the same bits"
    torch.testing.assert_close(found, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lookup", ["exact", "compat"])
def test_lookup_is_twice_differentiable(lookup):
    torch.manual_seed(3)
    table = CoordinateTable(2, (3, 4)).double()
    coords = (torch.rand(5, 2, dtype=torch.float64) * 1.8 - 0.9).requires_grad_(True)

    def call(weight, points):
        return torch.func.functional_call(table, {"weight": weight}, (points, lookup)).sin()

    weight = table.weight.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(call, (weight, coords))
    assert torch.autograd.gradgradcheck(call, (weight, coords))


def test_at_a_grid_point_the_derivative_is_one_sided_not_zero():
    table = CoordinateTable(1, (1, 3)).double()
    coords = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    table(coords).sum().backward()
    row = table.weight[0, :, 0].detach()
    assert coords.grad[0, 0].item() == pytest.approx((row[2] - row[1]).item())


def test_gradient_of_the_table_counts_every_reader():
    table = CoordinateTable(3, 4)
    point = grids.full(4, 4)[1, 2]
    table(point.expand(7, 2)).sum().backward()
    expected = torch.zeros(4, 4, 3)
    expected[1, 2] = 7
    assert torch.equal(table.weight.grad, expected)


def test_a_nan_coordinate_stays_in_its_own_pixel():
    table = CoordinateTable(3, 4)
    coords = torch.zeros(3, 2)
    coords[1, 0] = math.nan
    found = table(coords)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_on_its_own_grid_nothing_is_gathered(monkeypatch):
    torch.manual_seed(4)
    encoding = CoordinateEncoding(5, 6, (3, 4))
    own = grids.full(3, 4).flatten(0, 1)
    gathered = encoding(own)
    monkeypatch.setattr(F, "embedding", lambda *_: pytest.fail("gathered"))
    direct = encoding(size=(3, 4))
    assert torch.equal(direct, gathered)
    # Fourier features first, the table second
    assert torch.equal(direct[0, :, 5:], encoding.table.weight.reshape(12, 6))
    assert torch.equal(direct[0, :, :5], encoding.fourier(own))


def test_bfloat16_is_the_float32_encoding_rounded_once():
    torch.manual_seed(5)
    encoding = CoordinateEncoding(16, 8, 7)
    coords = torch.rand(2, 40, 2) * 2 - 1
    narrow = encoding(coords, dtype=torch.bfloat16)
    assert torch.equal(narrow, encoding(coords).bfloat16())
    assert narrow.shape == (2, 40, 24) and encoding(coords[0]).shape == (1, 40, 24)


@pytest.mark.parametrize("missing", ["fourier", "table"])
def test_one_part_may_be_missing(missing):
    torch.manual_seed(6)
    encoding = CoordinateEncoding(0 if missing == "fourier" else 5, 0 if missing == "table" else 6, (3, 4))
    assert getattr(encoding, missing) is None and encoding.features == (6 if missing == "fourier" else 5)
    coords = torch.rand(9, 2) * 2 - 1
    part = encoding.table if missing == "fourier" else encoding.fourier
    assert torch.equal(encoding(coords)[0], part(coords))
    assert encoding(size=(3, 4)).shape == (1, 12, encoding.features)
    assert {name.split(".")[0] for name, _ in encoding.named_parameters()} == {"fourier", "table"} - {missing}
    with pytest.raises(ValueError, match="expected at least one above 0, got 0 and 0"):
        CoordinateEncoding(0, 0, 3)


def test_in_float64_the_compat_lookup_is_exact():
    torch.manual_seed(7)
    table = CoordinateTable(6, (9, 5)).double()
    coords = torch.rand(300, 2) * 2 - 1  # float32 numbers, as a generator has them
    torch.testing.assert_close(table(coords, "compat"), sampled(table, coords, False), rtol=0, atol=1e-13)


def test_unknown_lookup():
    with pytest.raises(ValueError, match="lookup: expected one of exact, compat, got 'nearest'"):
        CoordinateTable(1, 2)(torch.zeros(1, 2), "nearest")


@pytest.mark.parametrize("save", ["some", "none"])
def test_what_is_kept_changes_no_gradient(save: str) -> None:
    config = GeneratorConfig(size=8, width=16, n_layers=3)
    z = torch.randn(2, config.style_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for kept in ("all", save):
        torch.manual_seed(0)
        generator = Generator(config, save=kept).double()
        generator(z, noise=3).square().sum().backward()
        found.append({name: p.grad for name, p in generator.named_parameters()})
    for name, gradient in found[0].items():
        # counter noise is float32
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)
