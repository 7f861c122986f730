"""Where the official code is wrong or lacks what it is meant to have: what its formulas do, and what this package does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cips import Generator, apps, grids
from official_formulas import OfficialGenerator, full_grid

SIZE = 8


@pytest.fixture
def pair() -> tuple[OfficialGenerator, Generator]:
    """The official formulas and this package's generator, with the same weights, in float64."""
    torch.manual_seed(0)
    model = OfficialGenerator(SIZE, (10, 10, 8, 6), fourier=7, table=9, style_dim=12, mapping=3).randomise().double()
    return model, Generator.from_official(model.state_dict()).eval()


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_shifted_lookup(pair):
    """In eval mode a pixel's embedding is not its entry of the table."""
    model, g = pair
    coords, table = full_grid(SIZE, SIZE).double(), model.emb.input
    trained, evaluated = (model.train(mode).encode(coords)[:, 7:] for mode in (True, False))
    assert torch.equal(trained, table) and (evaluated - table).abs().mean() > 0.1
    own = grids.full(SIZE, SIZE)
    entries = table[0].permute(1, 2, 0)
    assert torch.equal(g.encoding.table(own, "exact"), entries)
    assert close(g.encoding.table(own.double(), "compat"), evaluated[0].permute(1, 2, 0))


@torch.no_grad()
def test_the_whole_table_for_a_patch(pair):
    """In training a patch as large as the table gets all of it, wherever in the image it lies."""
    model, g = pair
    z, large = torch.randn(1, 12, dtype=torch.float64), 4 * SIZE
    places = [(0, 0), (13, 24)]
    patches = [grids.patch(large, SIZE, offset=place) for place in places]
    first, second = (model.train().encode(patch.permute(2, 0, 1)[None].double())[:, 7:] for patch in patches)
    assert torch.equal(first, second) and torch.equal(first, model.emb.input)
    image = g.train()(z, size=large, noise="off")
    for (top, left), patch in zip(places, patches):
        assert close(g(z, patch, noise="off"), image[..., top : top + SIZE, left : left + SIZE])
    tables = [g.encoding.table(patch) for patch in patches]
    assert not torch.equal(*tables) and not torch.equal(tables[0], g.encoding.table.weight)


@torch.no_grad()
def test_truncation_on_z(pair):
    """A mean w is mixed with z before the mapping network; here with w after it, as the paper means it."""
    model, g = pair
    z, mean = torch.randn(2, 12, dtype=torch.float64), g.w_mean[None]
    coords = full_grid(SIZE, SIZE).double().expand(2, -1, -1, -1)
    call = dict(truncation=0.5, truncation_latent=mean)
    theirs = model.eval()(coords, z, **call)
    assert close(theirs, model(coords, mean + 0.5 * (z - mean)))
    ours = g(z, truncation=0.5, lookup="compat", noise="off")
    assert (ours - theirs).abs().max() > 0.01
    assert close(ours, model(coords, model.style(z), **call, input_is_latent=True))
    still = g(z, truncation=0.0, noise="off")
    assert close(still, g(mean.expand(2, -1), input_is_w=True, noise="off"))


def test_the_crash_where_an_image_is_not_square():
    """Its coordinates repeat x as often as there are columns, and y as often as there are rows."""

    def official_coordinates(height: int, width: int) -> Tensor:
        x = torch.linspace(-1, 1, width).expand(1, 1, width, width)
        y = torch.linspace(-1, 1, height)[:, None].expand(1, 1, height, height)
        return torch.cat((x, y), 1)

    torch.testing.assert_close(official_coordinates(6, 6)[0].permute(1, 2, 0), grids.full(6, 6))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        official_coordinates(6, 10)
    assert grids.full(6, 10).shape == (6, 10, 2)
    with torch.no_grad():
        assert Generator("small")(torch.randn(1, 128), size=(6, 10)).shape == (1, 3, 6, 10)


@torch.no_grad()
def test_mixing_without_effect(pair):
    """It draws two latents and all layers take the first; here layers take the style that they are given."""
    model, g = pair
    a, b = torch.randn(2, 12, dtype=torch.float64)
    unmixed, other, mixed = apps.mix(g, a, b, [[3, 4]], noise="off")
    coords = full_grid(SIZE, SIZE).double()
    assert close(unmixed, model.train()(coords, a[None])[0]) and close(other, model(coords, b[None])[0])
    assert (mixed - unmixed).abs().max() > 0.01 and (mixed - other).abs().max() > 0.01

    # the official formulas by hand, the second w from the third group on
    w = model.style(torch.stack((a, b)))[:, None]
    x, rgb = model.conv1(model.encode(coords), w[0], None), 0
    for group, to_rgb in enumerate(model.to_rgbs, start=2):
        own = w[1] if group >= 3 else w[0]
        for layer in (2 * group - 4, 2 * group - 3):
            x = model.linears[layer](x, own, None)
        rgb = rgb + to_rgb(x, own)
    assert close(mixed, rgb[0])
