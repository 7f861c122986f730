"""What the applications draw is what the generator draws: pixel by pixel, layer by layer, latent by latent."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cips import Generator, GeneratorConfig, UsageError, apps, grids, presets
from cips.apps import draw as drawing
from cips.pictures import to_uint8

TINY = GeneratorConfig(
    size=(24, 20), style_dim=12, mapping_layers=3, fourier_features=7, table_features=9, widths=(10, 8, 8, 6, 6)
)


def make(config: GeneratorConfig = TINY) -> Generator:
    """The reference backend in float64: what it gives, rounded to float32, does not depend on how many pixels share
    a matrix product.
    """
    torch.manual_seed(0)
    g = Generator(config, backend="reference").double().eval()
    with torch.no_grad():
        for name, parameter in g.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                parameter.add_(torch.randn_like(parameter) * 0.5)
        g.w_mean.normal_()
    return g


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bits in float32."""
    return ours.shape == theirs.shape and torch.equal(ours.float(), theirs.float())


@torch.no_grad()
def test_a_pixel_has_the_same_colour_however_it_is_reached():
    g, z, seed = make(), torch.randn(1, 12, dtype=torch.float64), 7
    image = g(z, noise=seed)[0]
    assert ((g(z, noise=seed + 1)[0] - image).abs() > 1e-3).double().mean() > 0.95, "noise moves every pixel"
    assert same(g(z, grids.tile((24, 20), 5, 3, 11, 8), noise=seed)[0], image[:, 5:16, 3:11])
    assert same(g(z, grids.patch((24, 20), 6, 3, (2, 4)), noise=seed)[0], image[:, 2:18:3, 4:20:3])
    for share in (0.05, 0.25, 0.5, 1.0):
        points, (rows, columns) = (part if k == 0 else part.T for k, part in enumerate(grids.foveated((24, 20), share)))
        assert same(g(z, points, noise=seed)[0].T, image[:, rows, columns]), share
    large = g(z, size=(72, 60), noise=seed)[0]
    window = g(z, grids.window((24, 20), (0.5, -1), 3), noise=seed)[0]
    assert same(window, large[:, :24, 35:55])
    ring = g(z, grids.cylinder(24, 38), noise=seed)[0]
    assert same(ring[:, :, :20], image)


def test_a_picture_in_strips_is_the_picture(monkeypatch):
    g = make()
    w = apps.draw.styles(g, apps.draw.latents(g, 2, 3))
    blend = apps.pixel_weights(apps.mask_positions((24, 20), "vertical"), 2).double()
    coords = grids.cylinder(24, 20)
    calls = [(w[0], {}), (w[0], {"size": (9, 31)}), (w[0], {"coords": coords}), (w, {"blend": blend, "coords": coords})]
    whole = [apps.draw.draw(g, a, noise=5, **options) for a, options in calls]
    monkeypatch.setitem(drawing.STRIPS, "cpu", 70)
    for (a, options), expected in zip(calls, whole):
        assert same(apps.draw.draw(g, a, noise=5, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("space", ["w", "z"])
def test_an_interpolation_begins_and_ends_with_the_samples(space):
    g = make()
    z = apps.draw.latents(g, 3, 1)
    frames = list(apps.interpolate(g, z, 7, space=space, truncation=0.7, noise=2))
    samples = [g(z[k : k + 1], truncation=0.7, noise=2)[0] for k in range(3)]
    assert len(frames) == 7
    assert all(torch.equal(frames[3 * k], samples[k]) for k in range(3))
    ends = z if space == "z" else g.styles(z, truncation=0.7)
    third = torch.lerp(ends[:1], ends[1:2], 1 / 3)
    options = {"truncation": 0.7} if space == "z" else {"input_is_w": True}
    torch.testing.assert_close(frames[1], g(third, noise=2, **options)[0])
    loop = list(apps.interpolate(g, z, 6, space=space, loop=True, truncation=0.7, noise=2))
    assert all(torch.equal(loop[2 * k], samples[k]) for k in range(3)) and len(loop) == 6
    half = torch.lerp(ends[2:], ends[:1], 0.5)
    torch.testing.assert_close(loop[5], g(half, noise=2, **options)[0])


def test_the_papers_generator_has_eight_groups():
    groups = apps.layer_groups(presets["paper"])
    # one layer; then seven times two layers, with the ToRGB behind them (rows 15 to 21 of W+)
    assert groups == ((0,), *((2 * k - 1, 2 * k, 14 + k) for k in range(1, 8)))
    assert apps.paper_groups(8) == [[6, 7, 8], [3, 4, 5], [1, 2]]
    assert apps.layer_groups(presets["small"]) == ((0, 1, 6), (2, 3, 7), (4, 5, 8))
    assert apps.paper_groups(3) == [[3], [2], [1]] and apps.paper_groups(1) == [[1]]
    for config in (*presets.values(), TINY):
        layers, rgbs = len(config.layer_widths), len(config.rgb_layers)
        assert sorted(row for group in apps.layer_groups(config) for row in group) == list(range(layers + rgbs))


@torch.no_grad()
def test_mixing_is_w_plus_written_out():
    g = make()
    a, b = apps.draw.latents(g, 2, 1)
    images = apps.mix(g, a, b, [[1], [2, 3]], noise=4)
    wa, wb = g.styles(torch.stack((a, b)))
    # five layers, ToRGBs after the third and the fifth: group 1 is layer 1, group 2 layers 2 and 3 and their ToRGB
    written = [[wb, wa, wa, wa, wa, wa, wa], [wa, wb, wb, wb, wb, wb, wb]]
    for image, rows in zip(images[2:], written):
        torch.testing.assert_close(image, g(torch.stack(rows)[None], input_is_w=True, noise=4)[0])
    torch.testing.assert_close(images[:2], torch.cat([g(z[None], noise=4) for z in (a, b)]))
    assert (images[2] - images[0]).abs().max() > 1e-3 and (images[3] - images[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="groups: expected numbers from 1 to 3, got 4"):
        apps.mix(g, a, b, [[4]])


@torch.no_grad()
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_a_hard_blend_is_each_latents_own_image_in_its_region(direction):
    g = make()
    z = apps.draw.latents(g, 3, 1)
    weights = apps.pixel_weights(apps.mask_positions((24, 20), direction), 3, hard=True)
    image = apps.blend(g, z, weights, truncation=0.8, noise=6)
    seen = 0
    for k in range(3):
        own = g(z[k : k + 1], truncation=0.8, noise=6)[0]
        region = weights[..., k] == 1
        seen += region.sum().item()
        torch.testing.assert_close(image[:, region], own[:, region], rtol=1e-10, atol=1e-10)
        assert (image - own)[:, ~region].abs().max() > 1e-2
    assert seen == 24 * 20
    line = weights[0, :, 0] if direction == "horizontal" else weights[:, 0, 0]
    assert line.sum() == (7 if direction == "horizontal" else 8)


def test_smooth_weights_are_linear():
    weights = apps.pixel_weights(apps.mask_positions((2, 9)), 3)
    expected = np.stack([np.interp(np.arange(9), [0, 4, 8], np.eye(3)[k]) for k in range(3)], -1)
    torch.testing.assert_close(weights[1], torch.from_numpy(expected).float())
    with pytest.raises(ValueError, match="positions: .* from 0 to 1"):
        apps.pixel_weights(torch.tensor([[1.5]]), 2)
    with pytest.raises(ValueError, match="count"):
        apps.pixel_weights(torch.tensor([[0.5]]), 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["smooth", "hard", "ring", "none", "three at once"])
def test_pixels_of_the_same_two_latents_are_drawn_together(monkeypatch, kind):
    g = make()
    w = apps.draw.styles(g, apps.draw.latents(g, 4, 1))
    positions = apps.mask_positions((24, 20), "vertical")
    weights = {
        "smooth": apps.pixel_weights(positions, 4),
        "hard": apps.pixel_weights(positions, 4, hard=True),
        "ring": apps.ring_weights(20, 4).expand(24, -1, -1),
        "none": torch.zeros(24, 20, 4),
        "three at once": torch.rand(24, 20, 4, generator=torch.Generator().manual_seed(2)),
    }[kind].double()
    grid = grids.cylinder(24, 20) if kind == "ring" else grids.full(24, 20)
    expected = g(w[None], grid, input_is_w=True, noise=6, blend=weights)[0]
    monkeypatch.setitem(drawing.STRIPS, "cpu", 100 if kind == "ring" else 10_000)
    seen = []
    g.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    place = {"coords": grid} if kind == "ring" else {"size": (24, 20)}
    image = apps.draw.draw(g, w, blend=weights, noise=6, **place)
    assert same(image, expected)
    calls = {"smooth": [2] * 3, "hard": [2] * 3, "ring": [2] * 7, "none": [2], "three at once": [4]}
    assert seen == calls[kind]


@torch.no_grad()
@pytest.mark.parametrize("wrap", grids.WRAPS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_panorama_has_no_seam(wrap, count):
    g = make()
    for layer in g.synthesis.layers:
        layer.noise_strength.zero_()  # grain is not smooth anywhere
    g.encoding.table.weight.mul_(0.02)
    z = apps.draw.latents(g, count, 1)
    image = apps.panorama(g, z, size=(6, 360), wrap=wrap)
    steps = (image - image.roll(-1, 2)).abs().amax((0, 1))
    assert steps[-1] <= steps[:-1].max() * 1.05, "the step over the seam is one like any other"
    assert steps[-1] < 0.1 * (image.max() - image.min())
    turned = apps.panorama(g, z, size=(6, 360), start=90, wrap=wrap)
    torch.testing.assert_close(turned, image.roll(-90, 2), rtol=1e-5, atol=1e-6)
    part = apps.panorama(g, z, size=(6, 90), angle=90, start=315, wrap=wrap)
    torch.testing.assert_close(part, image.roll(45, 2)[:, :, :90], rtol=1e-5, atol=1e-6)


def test_latents_stand_evenly_round_a_panorama():
    weights = apps.ring_weights(12, 3)
    expected = np.stack([np.interp(np.arange(13), [0, 4, 8, 12], row) for row in np.eye(3)[:, [0, 1, 2, 0]]], -1)[:12]
    torch.testing.assert_close(weights, torch.from_numpy(expected).float())
    assert apps.natural_size((64, 65)) == (64, 128) and apps.natural_size((64, 65), 90) == (64, 32)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 1.0])
def test_foveation_keeps_what_it_computed_and_fills_the_rest(share):
    g = make()
    z = apps.draw.latents(g, 1, 2)[0]
    found = apps.foveate(g, z, share, gaze=(0.9, 0.9), seed=5, noise=5)
    own = g(z[None], noise=5)[0]
    rows, columns = found.positions.T
    assert same(found.image[:, rows, columns], own[:, rows, columns])
    assert found.image.isfinite().all() and found.image.shape == (3, 24, 20)
    assert round(share * 480) <= len(rows) <= round(share * 480) + 4
    assert found.draw_seconds > 0 and found.fill_seconds > 0


def test_a_rehearsal_is_not_timed_and_changes_nothing():
    g = make()
    z, calls = apps.draw.latents(g, 1, 2)[0], []

    def slow_at_first(*_):
        calls.append(1)
        time.sleep(0.3 if len(calls) == 1 else 0)

    once = apps.foveate(g, z, 0.05, noise=5)
    g.register_forward_pre_hook(slow_at_first)
    found = apps.foveate(g, z, 0.05, noise=5, rehearse=True)
    assert len(calls) == 2 and found.draw_seconds < 0.3
    assert same(found.image, once.image)


def test_filling_goes_through_a_smooth_field():
    _, positions = grids.foveated(32, 0.25, seed=1)
    corners = torch.tensor([(0, 0), (0, 31), (31, 0), (31, 31)])
    positions = torch.unique(torch.cat((positions, corners)), dim=0)
    full = grids.full(32, 32).double()
    field = torch.stack((1 + full[..., 0] * 2 - full[..., 1], full[..., 0] ** 2 + full.prod(-1)), -1)
    filled = apps.fill(field[positions[:, 0], positions[:, 1]], positions, (32, 32)).double()
    torch.testing.assert_close(filled[..., 0], field[..., 0], rtol=0, atol=1e-4)  # a plane is kept
    assert (filled[..., 1] - field[..., 1])[8:24, 8:24].abs().max() < 5e-3  # a parabola to third order
    with pytest.raises(ValueError, match="positions: expected the four corners"):
        apps.fill(torch.zeros(1, 3), torch.tensor([[0, 0]]), (4, 4))


@torch.no_grad()
def test_upscaling_is_the_denser_grid_beside_lanczos_of_the_same_points():
    g = make()
    z = apps.draw.latents(g, 1, 2)[0]
    found = apps.upscale(g, z, 2.5, noise=3)
    assert found.dense.shape == found.lanczos.shape == (3, 60, 50)
    assert same(found.dense, g(z[None], size=(60, 50), noise=3)[0])
    window = apps.upscale(g, z, 4, centre=(0, 0), noise=3)
    assert same(window.dense, g(z[None], size=(96, 80), noise=3)[0, :, 36:60, 30:50])
    with pytest.raises(ValueError, match="factor: expected a number of at least 1, got 0.5"):
        apps.upscale(g, z, 0.5)


@pytest.mark.parametrize("coords", [grids.full(60, 50), grids.window((24, 20), (0.1, 0.2), 3)], ids=["whole", "window"])
def test_lanczos_samples_where_the_grid_does(coords):
    # a plane shows a shift by a fraction of a pixel; the filter keeps it but for the border and its ripple
    own = grids.full(24, 20)
    image = torch.stack((own[..., 0], own[..., 1], own.sum(-1) / 2))
    expected = torch.stack((coords[..., 0], coords[..., 1], coords.sum(-1) / 2))
    inside = (coords.abs() < 0.6).all(-1)
    error = (apps.lanczos(image, coords) - expected)[:, inside].abs().max()
    assert inside.any() and error < 0.1 * (2 / 23), "a tenth of a trained pixel"


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 70), 32, (5, 3)])
def test_a_giga_image_is_the_image_drawn_at_once(size, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    g = make()
    z = apps.draw.latents(g, 1, 2)[0]
    path = tmp_path / "g.tif"
    apps.giga(path, g, z, size, tile=16, truncation=0.9, noise=8)
    expected = to_uint8(g(z[None], size=size, truncation=0.9, noise=8))[0].numpy()
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert page.is_tiled and page.tile == (16, 16) and len(tiff.pages) == 1
        assert np.array_equal(page.asarray(), expected)
    from PIL import Image

    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), expected), "readers other than tifffile agree"
    assert [p.name for p in tmp_path.iterdir()] == ["g.tif"]


MEMORY = """
import resource, sys, torch
from cips import Generator, GeneratorConfig, apps
torch.set_num_threads(1)
g = Generator(GeneratorConfig(size=(8, 8), style_dim=4, mapping_layers=1, fourier_features=4, table_features=4,
                              widths=(8, 8))).eval()
z = apps.draw.latents(g, 1)[0]
for side in (256, 2048):
    apps.giga(sys.argv[1], g, z, side, tile=128, noise="off")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux alone")
def test_memory_does_not_grow_with_a_giga_image(tmp_path):
    pytest.importorskip("tifffile")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "g.tif")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = (int(line) for line in done.stdout.split())
    # 64 times the pixels: 12 MB of bytes, 48 MB of float32 colours, 128 MB of activations
    assert large - small <= 10, f"peak memory went from {small} to {large} MB"


def test_a_giga_image_that_fails_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("tifffile")
    g = make()
    z = apps.draw.latents(g, 1, 2)[0]
    with pytest.raises(ValueError, match="tile: expected a positive multiple of 16, got 20"):
        apps.giga(tmp_path / "g.tif", g, z, 32, tile=20)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="x.tif: cannot be written"):
        apps.giga(tmp_path / "file" / "x.tif", g, z, 32, tile=16)
    pixels = iter([to_uint8, None])  # the second tile fails
    module = importlib.import_module("cips.apps.giga")
    monkeypatch.setattr(module, "to_uint8", lambda images: next(pixels)(images))
    with pytest.raises(TypeError):
        apps.giga(tmp_path / "g.tif", g, z, 32, tile=16)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
