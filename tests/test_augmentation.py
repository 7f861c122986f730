"""Augmentations against numpy loops, scipy and torchvision; twice differentiable; ADA's probability by its rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch

from cips import UsageError
from cips.training.augmentation import (
    AUGMENTATIONS,
    AdaptiveAugment,
    Augmentation,
    DiffAugment,
    ada,
    diffaug,
    parse_kinds,
)
from cips.training.augmentation.warp import CENTRE, SYM6, Warp, bilinear, blit


def pictures(count: int = 4, height: int = 12, width: int = 16, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(count, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_colour_is_torchvisions_brightness_and_contrast_and_a_blend_with_grey():
    images = pictures()
    torch.manual_seed(5)
    found = diffaug.colour(images)
    torch.manual_seed(5)
    a, b, c = torch.rand(3, 4, dtype=torch.float64)
    for k, image in enumerate(images.numpy()):
        x = image + (a[k].item() - 0.5)
        grey = x.mean(0)
        x = np.stack([grey + (plane - grey) * 2 * b[k].item() for plane in x])
        x = x.mean() + (x - x.mean()) * (c[k].item() + 0.5)
        np.testing.assert_allclose(found[k].numpy(), x, atol=1e-12)
    assert (found - images).abs().amax((1, 2, 3)).min() > 1e-3


def test_translation_moves_every_image_by_itself_and_lets_zeros_in():
    images = pictures(200) + 5
    torch.manual_seed(3)
    found = diffaug.translation(images)
    met = set()
    for image, moved in zip(images.numpy(), found.numpy()):
        fits = []
        for down in range(-2, 3):  # an eighth of 12 is 1.5, and half is rounded up
            for right in range(-2, 3):
                expected = scipy.ndimage.shift(image, (0, down, right), order=0, cval=0.0)
                if np.array_equal(expected, moved):
                    fits.append((down, right))
        assert len(fits) == 1
        met.add(fits[0])
    assert len(met) == 25, "every shift is met"


def test_cutout_hides_one_rectangle_of_half_the_sides():
    images = pictures(300) + 5
    torch.manual_seed(3)
    found = diffaug.cutout(images)
    corners = []
    for image, cut in zip(images.numpy(), found.numpy()):
        hidden = (cut == 0).all(0)
        assert np.array_equal(cut, np.where(hidden, 0, image))
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        assert np.array_equal(hidden, np.outer(hidden.any(1), hidden.any(0))), "a rectangle"
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
        corners.append((rows[0], rows[-1], columns[0], columns[-1]))
    # 6 x 8 of 12 x 16, the middle on any corner of a pixel, so that as little as half of each side stays inside
    heights = {bottom - top + 1 for top, bottom, _, _ in corners}
    widths = {right - left + 1 for _, _, left, right in corners}
    assert heights == {3, 4, 5, 6} and widths == {4, 5, 6, 7, 8}
    assert len({corner[:2] for corner in corners}) == 13, "every place is met"


def test_the_filter_is_the_wavelets():
    pywt = pytest.importorskip("pywt")
    np.testing.assert_allclose(SYM6, pywt.Wavelet("sym6").dec_lo, atol=1e-14)


def warped(image: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """One plane: reflection by numpy, filters by scipy.signal, reading by scipy.ndimage."""
    height, width = image.shape
    wide = 3 * max(height, width)
    fine = np.pad(image, wide, mode="reflect")
    for axis in (0, 1):
        fine = scipy.signal.upfirdn(SYM6, fine, up=2, axis=axis)
    places = [(np.arange(2 * (n - 1) + 12) - CENTRE) / 2 - (n - 1) / 2 for n in (height, width)]
    y, x = np.meshgrid(*places, indexing="ij")
    source_x = inverse[0, 0] * x + inverse[0, 1] * y + inverse[0, 2] + (width - 1) / 2
    source_y = inverse[1, 0] * x + inverse[1, 1] * y + inverse[1, 2] + (height - 1) / 2
    entries = [2 * (source + wide) + CENTRE for source in (source_y, source_x)]
    moved = scipy.ndimage.map_coordinates(fine, entries, order=1)
    for axis in (0, 1):
        # scipy convolves, and bringing back correlates: the taps the other way round
        moved = scipy.signal.upfirdn(SYM6[::-1], moved, down=1, axis=axis)
        moved = np.take(moved, np.arange(11, moved.shape[axis] - 11, 2), axis=axis)
    return moved


@pytest.mark.parametrize("kind", ["identity", "near", "far"])
def test_a_warp_is_filters_and_reading_by_scipy(kind):
    images = pictures(3)
    if kind == "far":  # beyond the margin the finer image is mirrored: the filter, not quite symmetric, is turned round
        images = torch.from_numpy(scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, 2, 2), mode="mirror")) * 5
    random = np.random.default_rng(0)
    inverse = np.tile(np.eye(3)[:2], (3, 1, 1))
    if kind != "identity":
        inverse[:, :, :2] += random.normal(0, 0.1, (3, 2, 2))
        inverse[:, :, 2] = random.normal(0, 1 if kind == "near" else 8, (3, 2))
    found = Warp().double()(images, torch.from_numpy(inverse)).numpy()
    expected = np.array([[warped(plane, m) for plane in image] for image, m in zip(images.numpy(), inverse)])
    if kind == "identity":
        np.testing.assert_allclose(found, images.numpy(), atol=1e-9)
    off = np.abs(found - expected)
    assert kind == "near" or off.max() < (1e-9 if kind == "identity" else 0.03 * expected.std())
    assert kind != "near" or off[:, :, 4:-4, 4:-4].max() < 1e-9


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.0])
def test_a_smooth_picture_is_turned_about_its_middle(angle):
    """Against the same function of the turned coordinates, which no filter made."""
    y, x = torch.meshgrid(*[torch.arange(32, dtype=torch.float64) - 15.5] * 2, indexing="ij")

    def picture(x, y):
        return torch.sin(0.3 * x + 0.2) * torch.cos(0.2 * y - 0.4)

    turned = ada.rotations(torch.tensor([-angle], dtype=torch.float64))[:, :2]
    found = Warp().double()(picture(x, y)[None, None], turned)[0, 0]
    c, s = math.cos(angle), math.sin(angle)
    expected = picture(c * x + s * y, -s * x + c * y)
    disc = x**2 + y**2 < 11**2
    assert (found - expected)[disc].abs().max() < 0.02
    assert angle == 0 or (found - picture(x, y))[disc].abs().max() > 0.2


def test_bilinear_reading_is_scipys():
    images = pictures(2)
    random = np.random.default_rng(0)
    rows, columns = random.uniform(-2, 14, (2, 5, 6)), random.uniform(-2, 18, (2, 5, 6))
    found = bilinear(images, torch.from_numpy(rows), torch.from_numpy(columns)).numpy()
    for b in range(2):
        for c in range(3):
            at = [rows[b].clip(0, 11), columns[b].clip(0, 15)]
            expected = scipy.ndimage.map_coordinates(images[b, c].numpy(), at, order=1, mode="nearest")
            np.testing.assert_allclose(found[b, c], expected, atol=1e-12)


def test_blits_are_exact_flips_turns_and_moves():
    """Every image is one of the eight symmetries of a square, moved by whole pixels, and all of them occur."""
    images = pictures(1, 16, 16).expand(400, -1, -1, -1)
    torch.manual_seed(0)
    augment = AdaptiveAugment(["blit"], fixed=1.0).double()
    found = augment(images).numpy()
    base, seen, moves = images[0].numpy(), set(), set()
    symmetric = {
        (flip, turn): np.pad(np.rot90(base[:, :, ::-1] if flip else base, turn, (1, 2)), ((0, 0), (8, 8), (8, 8)), "reflect")
        for flip in (0, 1)
        for turn in range(4)
    }
    for image in found:
        fits = [
            (key, (down, right))
            for key, wide in symmetric.items()
            for down in range(-2, 3)
            for right in range(-2, 3)
            if np.array_equal(wide[:, 8 - down : 24 - down, 8 - right : 24 - right], image)
        ]
        assert len(fits) == 1, fits
        seen.add(fits[0][0])
        moves.add(fits[0][1])
    assert len(seen) == 8 and len(moves) == 25


def test_colours_are_the_papers_matrices():
    torch.manual_seed(0)
    count = 4000
    matrices = ada.colours(torch.tensor(1.0), count).double()
    assert torch.equal(matrices[:, 3], torch.tensor([0.0, 0, 0, 1]).double().expand(count, -1))
    v = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)
    linear = matrices[:, :3, :3]
    # all but brightness leave the grey axis an eigenvector: contrast, with the mirror's sign
    along = linear @ v
    contrast = along @ v
    torch.testing.assert_close(along, contrast[:, None] * v, rtol=1e-4, atol=1e-5)
    logs = contrast.abs().log2()
    assert abs(logs.mean()) < 0.03 and abs(logs.std() - 0.5) < 0.02
    assert abs((contrast < 0).double().mean() - 0.5) < 0.03
    # across it: a rotation times contrast times saturation
    across = linear - contrast[:, None, None] * torch.outer(v, v)
    gram = across.transpose(1, 2) @ across
    flat = torch.eye(3, dtype=torch.float64) - torch.outer(v, v)
    square = (gram * flat).sum((1, 2)) / 2
    torch.testing.assert_close(gram, square[:, None, None] * flat, rtol=1e-3, atol=1e-3 * square.max().item())
    saturation = (square.sqrt() / contrast.abs()).log2()
    assert abs(saturation.mean()) < 0.06 and abs(saturation.std() - 1) < 0.04
    brightness = matrices[:, :3, 3] @ v / math.sqrt(3) / contrast
    assert abs(brightness.mean()) < 0.02 and abs(brightness.std() - 0.2) < 0.01


def test_a_hue_rotation_is_scipys():
    angle = torch.tensor([0.4, -2.0], dtype=torch.float64)
    for a, matrix in zip(angle, ada.hue_rotations(angle)):
        expected = scipy.spatial.transform.Rotation.from_rotvec(a.item() * np.ones(3) / math.sqrt(3)).as_matrix()
        np.testing.assert_allclose(matrix[:3, :3].numpy(), expected, atol=1e-6)


def test_geometry_has_the_papers_distribution():
    torch.manual_seed(0)
    maps = ada.geometry(torch.tensor(1.0), 20_000, 64, 128).double()
    areas = -torch.linalg.det(maps[:, :2, :2]).log2() / 2  # of scaling alone: stretching and turning keep areas
    assert abs(areas.mean()) < 0.01 and abs(areas.std() - 0.2) < 0.01
    ratio = torch.linalg.svdvals(maps[:, :2, :2])
    spread = (ratio[:, 0] / ratio[:, 1]).log2() / 2  # |log2 of the stretch|
    assert abs(spread.square().mean().sqrt() - 0.2) < 0.01
    moves = -torch.linalg.solve(maps[:, :2, :2], maps[:, :2, 2, None])[:, :, 0]
    # the move is the last change, so it is seen as it is
    assert abs(moves[:, 0].std() / 16 - 1) < 0.03 and abs(moves[:, 1].std() / 8 - 1) < 0.03
    # one rotation or both, with probability p
    maps = ada.geometry(torch.tensor(0.3), 20_000, 64, 64)
    straight = (maps[:, 0, 1].abs() < 1e-7) & (maps[:, 1, 0].abs() < 1e-7)
    assert abs((~straight).double().mean() - 0.3) < 0.015
    still = (maps[:, :2, 2].abs() < 1e-7).all(1)
    assert abs((~still).double().mean() - 0.3) < 0.015


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_change_happens_with_its_probability(p):
    images = pictures(1).expand(600, -1, -1, -1)
    torch.manual_seed(0)
    found = AdaptiveAugment(["geometry", "colour"], fixed=p).double()(images)
    same = ((found - images).abs().amax((1, 2, 3)) < 1e-4).double().mean()
    # ten changes: scale, two rotations, stretch, move; five of colour, of which one is a coin beside
    rotation = 1 - math.sqrt(1 - p)
    expected = (1 - p) ** 3 * (1 - rotation) ** 2 * (1 - p) ** 4 * (1 - p / 2)
    assert abs(same - expected) < 0.03
    assert p or torch.allclose(found, images, atol=1e-4)


@pytest.mark.parametrize("name", ["diffaug", "ada", *ada.KINDS[3:]])
def test_gradients_of_both_orders(name):
    make = {"diffaug": DiffAugment, "ada": lambda: AdaptiveAugment(fixed=0.9)}
    augment = make.get(name, lambda: AdaptiveAugment([name], fixed=0.9))().double()
    images = pictures(2, 8, 8).requires_grad_(True)
    directions = {"fast_mode": True}  # random directions instead of every pixel

    def run(images):
        torch.manual_seed(11)
        return augment(images)

    assert torch.autograd.gradcheck(run, (images,), **directions)
    assert torch.autograd.gradgradcheck(lambda x: run(x).pow(3), (images,), **directions)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shapes_devices_and_dtypes_stay(name):
    make = {"none": Augmentation, "diffaug": DiffAugment, "ada": lambda: AdaptiveAugment(ada.KINDS, fixed=1.0)}
    for shape in ((1, 3, 8, 8), (5, 3, 16, 32), (2, 3, 64, 16)):
        images = torch.rand(shape) * 2 - 1
        found = make[name]()(images)
        assert found.shape == shape and found.dtype == images.dtype and found.isfinite().all()
    assert torch.equal(found, images) == (name == "none")


def test_kinds_by_name_and_by_the_papers_sets():
    assert parse_kinds("ada", None) == parse_kinds("ada", "bgc") == ("blit", "geometry", "colour")
    assert parse_kinds("ada", " bgcfnc ") == ("blit", "geometry", "colour", "filter", "noise", "cutout")
    assert parse_kinds("ada", "noise, blit") == ("noise", "blit") and AdaptiveAugment(["noise", "blit"]).kinds == ("blit", "noise")
    assert parse_kinds("diffaug", None) == ("colour", "translation", "cutout") and parse_kinds("none", None) == ()
    for name in ("diffaug", "none"):
        with pytest.raises(UsageError, match="augment_kinds: expected .*, got 'bgc'"):
            parse_kinds(name, "bgc")


def test_torchvision_agrees_on_mirrors_and_turns():
    """Mirrors, turns and moves in the sense of another library."""
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    image = pictures(1, 16, 16)
    maps = {
        "flip": (ada.scales(torch.tensor([-1.0]), torch.tensor([1.0])), tv.horizontal_flip(image)),
        "quarter": (ada.rotations(torch.tensor([math.pi / 2])), tv.rotate(image, 90)),
        "move": (ada.translations(torch.tensor([-3.0]), torch.tensor([2.0])), torch.roll(image, (-2, 3), (2, 3))),
    }
    for name, (inverse, expected) in maps.items():
        inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
        assert torch.equal(blit(image, inverse[:, :2])[inside], expected[inside]), name
        if name == "move":
            found = Warp()(image, inverse[:, :2].double())
            torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-9)


def test_the_probability_follows_the_signs():
    """By the rule: every fourth step up or down by the images seen since over 500,000, never below 0 or above 1."""
    augment = AdaptiveAugment(target=0.6, images=100)
    random = np.random.default_rng(0)
    p, signs, seen = 0.0, 0.0, 0
    history = []
    for step in range(1, 121):
        share = 0.95 if 20 < step <= 70 else 0.5
        logits = torch.from_numpy(np.where(random.random(8) < share, 1.0, -1.0) * random.uniform(0.1, 3, 8))
        augment.observe(logits)
        signs, seen = signs + logits.sign().sum().item(), seen + 8
        if step % 4 == 0:
            p = min(max(p + math.copysign(1, signs / seen - 0.6) * seen / 100, 0), 1)
            signs, seen = 0.0, 0
        history.append(augment.probability.item())
        assert history[-1] == pytest.approx(p, abs=1e-6)
    assert history[19] == 0 and max(history) == 1 and history[-1] < 1


def test_a_fixed_probability_stays():
    augment = AdaptiveAugment(fixed=0.25)
    for _ in range(8):
        augment.observe(torch.ones(4))
    assert augment.probability.item() == 0.25


def test_the_state_carries_the_probability_on():
    a, b = AdaptiveAugment(images=50), AdaptiveAugment(images=50)
    for _ in range(6):
        a.observe(torch.ones(4))
    b.load_state_dict(a.state_dict())
    for _ in range(6):
        a.observe(torch.ones(4))
        b.observe(torch.ones(4))
    assert a.probability > 0 and torch.equal(a.probability, b.probability) and torch.equal(a.tally, b.tally)


def _observe(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    augment = AdaptiveAugment(images=100)
    for _ in range(8):
        # a mean sign of 0.5 there and 1 here: below and above the target apart, above it together
        augment.observe(torch.full((4,), 1.0) if rank else torch.tensor([1.0, 1.0, 1.0, -1.0]))
    torch.save(augment.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_count_together(tmp_path):
    """Two processes adapt as one with the images of both."""
    torch.multiprocessing.spawn(_observe, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    alone = AdaptiveAugment(images=100)
    for _ in range(8):
        alone.observe(torch.tensor([1.0, 1, 1, -1, 1, 1, 1, 1]))
    assert alone.probability.item() == pytest.approx(0.64)
    assert all(torch.equal(a[key], value) for key, value in alone.state_dict().items())
