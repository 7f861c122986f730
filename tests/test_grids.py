"""Coordinate grids: the formula in exact arithmetic, and the same bits however a point is reached."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from cips import grids


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("count", [2, 3, 7, 64, 255, 256, 1000, 1024, 4097])
def test_coordinate_is_the_exact_quotient_rounded(count):
    # Fraction -> float is correctly rounded, and so is float64 -> float32
    exact = np.array([float(Fraction(2 * i - (count - 1), count - 1)) for i in range(count)]).astype(
        np.float32
    )
    ours = grids.coordinate(torch.arange(count), count)
    assert ours.dtype == torch.float32
    assert torch.equal(bits(ours), bits(torch.from_numpy(exact)))
    assert ours[0] == -1 and ours[-1] == 1


def test_coordinate_of_a_side_longer_than_float32_can_count():
    count = 3 * 10**8 + 1
    positions = [0, 150_000_000, 150_000_001, count - 1, *range(1, count, 1_234_567)]
    exact = np.array([float(Fraction(2 * i - (count - 1), count - 1)) for i in positions]).astype(np.float32)
    ours = grids.coordinate(torch.tensor(positions), count)
    assert torch.equal(bits(ours), bits(torch.from_numpy(exact)))


@pytest.mark.parametrize("height, width", [(4, 4), (5, 9), (1, 3), (6, 1), (256, 64)])
def test_full_is_x_along_rows_and_y_down(height, width):
    grid = grids.full(height, width)
    xs = torch.linspace(-1, 1, width, dtype=torch.float64) if width > 1 else torch.zeros(1)
    ys = torch.linspace(-1, 1, height, dtype=torch.float64) if height > 1 else torch.zeros(1)
    for row in range(height):
        torch.testing.assert_close(grid[row, :, 0].double(), xs.double(), rtol=0, atol=6e-8)
    for column in range(width):
        torch.testing.assert_close(grid[:, column, 1].double(), ys.double(), rtol=0, atol=6e-8)


def test_patch_and_tile_have_the_bits_of_the_full_grid():
    random = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(n) for n in random.integers(20, 300, 2))
        full = bits(grids.full(height, width))
        sigma = int(random.integers(1, 5))
        rows = int(random.integers(1, (height - 1) // sigma + 2))
        columns = int(random.integers(1, (width - 1) // sigma + 2))
        top = int(random.integers(0, height - (rows - 1) * sigma))
        left = int(random.integers(0, width - (columns - 1) * sigma))
        patch = grids.patch((height, width), (rows, columns), sigma, (top, left))
        expected = full[
            top : top + (rows - 1) * sigma + 1 : sigma, left : left + (columns - 1) * sigma + 1 : sigma
        ]
        assert torch.equal(bits(patch), expected)
    tile = grids.tile((40, 30), 7, 11, 13, 5)
    assert torch.equal(bits(tile), bits(grids.full(40, 30))[7:20, 11:16])


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_dense_holds_every_pixel(factor):
    dense = grids.dense(33, 20, factor)
    assert dense.shape == (32 * factor + 1, 19 * factor + 1, 2)
    assert torch.equal(bits(dense[::factor, ::factor]), bits(grids.full(33, 20)))
    step = dense[0, 1, 0] - dense[0, 0, 0]
    assert step.item() == pytest.approx(2 / (19 * factor), rel=1e-5)


def test_a_dilated_patch_reaches_the_last_pixel_and_no_further():
    # the paper's condition 0 <= u < W - (K - 1) sigma, both ends tried
    assert grids.patch(64, 16, 4, (3, 3))[-1, -1].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"offset: left=4 .*0 <= left < 4"):
        grids.patch(64, 16, 4, (3, 4))
    with pytest.raises(ValueError, match=r"offset: top=-1"):
        grids.patch(64, 16, 1, (-1, 0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: grids.full(0, 4), "size"),
        (lambda: grids.full(4.0, 4), "size"),
        (lambda: grids.patch((4, 4, 4), 2), "size"),
        (lambda: grids.patch(4, 0), "k: "),
        (lambda: grids.patch(4, 2, 0), "sigma"),
        (lambda: grids.patch(4, 5), "offset"),
        (lambda: grids.dense(4, 4, 0), "factor"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
