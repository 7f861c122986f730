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


def test_a_window_is_a_rectangle_of_the_magnified_image():
    size, zoom = (12, 10), 3.5
    whole = bits(grids.full(42, 35))
    for centre, (top, left) in {
        (0.0, 0.0): (15, 12),  # 20.5 - 5.5, 17 - 4.5 to the even
        (-1.0, -1.0): (0, 0),
        (1.0, 1.0): (30, 25),
        (1.0, -1.0): (0, 25),
        (0.0, 1.0): (30, 12),
    }.items():
        assert torch.equal(bits(grids.window(size, centre, zoom)), whole[top : top + 12, left : left + 10]), centre
    assert torch.equal(bits(grids.window(size)), bits(grids.full(*size)))


def test_foveated_points_are_pixels_of_the_full_grid():
    full = bits(grids.full(30, 41))
    for share in (0.05, 0.25, 0.5, 1.0):
        points, positions = grids.foveated((30, 41), share, gaze=(0.3, -0.5), seed=4)
        assert len(points) == round(share * 30 * 41) and positions.dtype == torch.int64
        assert torch.equal(bits(points), full[positions[:, 0], positions[:, 1]])
        order = positions[:, 0] * 41 + positions[:, 1]
        assert (order.diff() > 0).all(), "each once, in the order of the image"
        assert torch.equal(positions, grids.foveated((30, 41), share, gaze=(0.3, -0.5), seed=4)[1])
    assert len(points) == 30 * 41
    assert not torch.equal(grids.foveated(30, 0.2, seed=1)[1], grids.foveated(30, 0.2, seed=2)[1])
    assert len(grids.foveated(30, 1e-9)[0]) == 1


def test_foveated_draws_without_replacement_from_the_gaussian():
    # two of six pixels: the chance that pixel i is among them is p_i + sum_j p_j p_i / (1 - p_j), j other than i
    height, width, gaze, sigma = 2, 3, (1.0, -1.0), 0.4
    y, x = np.mgrid[0:height, 0:width]
    dx, dy = x / (width - 1) - (gaze[0] + 1) / 2, y / (height - 1) - (gaze[1] + 1) / 2
    p = np.exp(-(dx**2 + dy**2) / (2 * sigma**2)).ravel()
    p /= p.sum()
    expected = np.array([p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)])
    draws, counts = 2000, np.zeros(6)
    for seed in range(draws):
        rows, columns = grids.foveated((height, width), 2 / 6, gaze, sigma, seed)[1].T.numpy()
        counts[rows * width + columns] += 1
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) < 4.5 * deviation).all(), (counts / draws, expected)


def test_a_cylinder_that_mirrors_holds_the_full_grid_and_closes():
    full, grid = bits(grids.full(7, 9)), bits(grids.cylinder(7, 16))
    assert torch.equal(grid[:, :9], full)
    assert torch.equal(grid[:, 9:], full[:, 1:8].flip(1)), "back the same way"
    exact = [float(4 * abs(Fraction(i, 10) - round(Fraction(i, 10))) - 1) for i in range(10)]
    assert torch.equal(grids.cylinder(3, 10)[0, :, 0], torch.tensor(exact))


@pytest.mark.parametrize("wrap", grids.WRAPS)
def test_a_cylinder_is_periodic_in_bits(wrap):
    grid = bits(grids.cylinder(5, 24, wrap=wrap))
    assert torch.equal(bits(grids.cylinder(5, 24, start=360, wrap=wrap)), grid)
    assert torch.equal(bits(grids.cylinder(5, 24, start=-45, wrap=wrap)), grid.roll(3, 1))
    half = bits(grids.cylinder(5, 12, 180, start=270, wrap=wrap))
    assert torch.equal(half, grid.roll(6, 1)[:, :12])


def test_a_ring_holds_no_point_twice_and_its_steps_are_even():
    grid = grids.cylinder(9, 40, wrap="ring", inner=0.2).double()
    radius = grid.norm(dim=-1)
    torch.testing.assert_close(radius, torch.linspace(1, 0.2, 9).double()[:, None].expand(9, 40), rtol=0, atol=1e-6)
    phi = torch.atan2(grid[..., 1], grid[..., 0]).remainder(2 * torch.pi)
    expected = torch.arange(40).double() * 2 * torch.pi / 40
    assert ((phi - expected + 1).remainder(2 * torch.pi) - 1).abs().max() < 1e-6
    # the seam is a step like every other
    steps = (grid - grid.roll(1, 1)).norm(dim=-1)
    torch.testing.assert_close(steps, steps[:, :1].expand(9, 40), rtol=0, atol=1e-6)


def test_points_are_taken_as_they_are():
    assert grids.points([(0.5, -1), (0, 1)]).tolist() == [[0.5, -1.0], [0.0, 1.0]]
    positions = torch.tensor([[[0, 3], [2, 1]]])
    assert torch.equal(bits(grids.pixels(positions, (3, 4)))[0], bits(grids.full(3, 4))[[0, 2], [3, 1]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: grids.window(4, (0, 2)), r"centre: expected \(x, y\), each from -1 to 1"),
        (lambda: grids.window(4, (0, 0), 0.5), "zoom: .* at least 1, got 0.5"),
        (lambda: grids.window(4, (0, 0), float("nan")), "zoom"),
        (lambda: grids.foveated(4, 0), "share: .* above 0 and at most 1, got 0"),
        (lambda: grids.foveated(4, 1.01), "share"),
        (lambda: grids.foveated(4, 0.5, (0, 0, 0)), "gaze"),
        (lambda: grids.foveated(4, 0.5, sigma=0), "sigma"),
        (lambda: grids.cylinder(4, 8, 361), "angle: expected whole degrees from 1 to 360, got 361"),
        (lambda: grids.cylinder(4, 8, 90.0), "angle"),
        (lambda: grids.cylinder(4, 8, start=0.5), "start"),
        (lambda: grids.cylinder(4, 8, wrap="knot"), "wrap: expected mirror or ring, got 'knot'"),
        (lambda: grids.cylinder(4, 8, wrap="ring", inner=1), "inner"),
        (lambda: grids.points([1.0, 2.0]), r"values: .*\[P, 2\]"),
        (lambda: grids.points([(1.0, float("nan"))]), "values"),
        (lambda: grids.pixels(torch.tensor([[4, 0]]), 4), "positions: expected rows below 4"),
        (lambda: grids.pixels(torch.tensor([[0, -1]]), 4), "positions"),
        (lambda: grids.pixels(torch.tensor([0]), 4), "positions"),
    ],
)
def test_errors_of_the_other_grids(call, message):
    with pytest.raises(ValueError, match=message):
        call()
