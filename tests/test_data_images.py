"""What becomes of every kind of picture, of every size, against numpy and PIL used by hand."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cips import UsageError
from cips.data import Batches, Preparation, TooSmallError, check_fit, open_source
from pictures_made import encoded, noise_image, write_folder

BASE = noise_image(8, 8)
PIXELS = np.asarray(BASE)


def kept(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    return Preparation(8)(encoded(image, kind, **options))


def near(a: np.ndarray, b: np.ndarray, levels: float) -> bool:
    return np.abs(a.astype(float) - b).max() <= levels


def test_grey_and_black_and_white():
    grey = np.asarray(BASE.convert("L"))
    assert np.array_equal(kept(Image.fromarray(grey)), np.repeat(grey[:, :, None], 3, 2))
    bits = BASE.convert("1")
    assert np.array_equal(kept(bits), np.repeat(np.asarray(bits)[:, :, None], 3, 2) * np.uint8(255))


def test_alpha_is_blended_over_white():
    alpha = np.random.default_rng(1).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    blended = PIXELS * (alpha / 255) + 255 * (1 - alpha / 255)
    assert near(kept(Image.fromarray(np.concatenate((PIXELS, alpha), 2))), blended, 1)
    grey = PIXELS[:, :, :1]
    blended = grey * (alpha / 255) + 255 * (1 - alpha / 255)
    assert near(kept(Image.fromarray(np.concatenate((grey, alpha), 2))), blended.repeat(3, 2), 1)
    opaque = BASE.convert("RGBA")
    assert np.array_equal(kept(opaque), PIXELS)


def test_palettes_and_their_transparent_entries():
    image = BASE.quantize(4)
    colours = np.array(image.getpalette()[:12], np.uint8).reshape(4, 3)
    indices = np.asarray(image)
    assert np.array_equal(kept(image), colours[indices])
    clear = colours[indices].copy()
    clear[indices == 2] = 255
    assert np.array_equal(kept(image, transparency=2), clear)
    assert np.array_equal(kept(image, "GIF", transparency=2), clear)


def png(values: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG by the format's own rules: colour 0 is grey, 2 is RGB."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.random.default_rng(2).integers(0, 2**16, (8, 8, 3), dtype=np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    grey = np.round(values[:, :, :1] / 257).repeat(3, 2)
    assert np.array_equal(Preparation(8)(png(values[:, :, 0], 0)), grey)
    assert np.array_equal(kept(Image.fromarray(values[:, :, 0]), "TIFF"), grey)
    wide = Image.fromarray(values[:, :, 0].astype(np.int32))
    assert np.array_equal(kept(wide, "TIFF"), grey)
    assert near(Preparation(8)(png(values, 2)), values / 257, 1)
    for value in (-1, 65536):
        beyond = np.full((8, 8), value, np.int32)
        with pytest.raises(ValueError, match="32-bit integer pixels beyond 0 to 65535"):
            kept(Image.fromarray(beyond), "TIFF")
    with pytest.raises(ValueError, match="floating-point pixels"):
        kept(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")


def test_cmyk():
    inks = np.random.default_rng(3).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    light = 255 - inks.astype(float)
    expected = light[:, :, :3] * light[:, :, 3:] / 255
    assert near(kept(Image.fromarray(inks, "CMYK"), "TIFF"), expected, 1.01)


def test_exif_turns():
    wide = noise_image(12, 8)
    pixels = np.asarray(wide)
    # which row and column of the file is the first of the picture, by the EXIF standard
    truths = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels),
    }
    for number, truth in truths.items():
        exif = Image.Exif()
        exif[0x0112] = number
        whole = Preparation(8, "random")
        assert np.array_equal(whole(encoded(wide, exif=exif)), truth), number
        grey = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        assert np.array_equal(whole(encoded(grey, exif=exif))[:, :, 0], truth[:, :, 0]), number
    for exif in (b"Exif\0\0no such thing", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"):
        assert np.array_equal(kept(BASE, exif=exif), PIXELS), "broken EXIF beside a sound picture"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_counts(kind):
    frames = [noise_image(8, 8, seed).quantize(8).convert("RGB") for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(Preparation(8)(data), np.asarray(frames[0]))


def test_skimages_pictures_by_hand():
    data = pytest.importorskip("skimage.data")
    for pixels in (data.astronaut(), data.camera(), data.coffee(), data.rocket()):
        colour = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, 2)
        height, width = pixels.shape[:2]
        assert np.array_equal(Preparation(64, "random")(encoded(Image.fromarray(pixels))), colour)
        scaled = Image.fromarray(colour).resize(
            (round(width * 64 / min(height, width)), round(height * 64 / min(height, width))), Image.Resampling.LANCZOS
        )
        left, top = (scaled.width - 64) // 2, (scaled.height - 64) // 2
        expected = np.asarray(scaled)[top : top + 64, left : left + 64]
        assert np.array_equal(Preparation(64)(encoded(Image.fromarray(pixels))), expected)


def test_the_shorter_side_is_scaled_and_the_middle_cut_out():
    wide, tall = noise_image(40, 16), noise_image(8, 11)
    lanczos = Image.Resampling.LANCZOS
    assert np.array_equal(kept(tall), np.asarray(tall)[1:9])
    assert np.array_equal(kept(wide), np.asarray(wide.resize((20, 8), lanczos))[:, 6:14])
    half = np.asarray(wide.resize((25, 10), lanczos))
    assert np.array_equal(Preparation(8, load_size=10)(encoded(wide)), half[1:9, 8:16])
    assert np.array_equal(Preparation(8, "random", load_size=10)(encoded(wide)), half)
    assert np.array_equal(Preparation(8, "random", load_size=99)(encoded(wide)), np.asarray(wide)), "never up"
    assert np.array_equal(Preparation(8, load_size=99)(encoded(wide)), np.asarray(wide)[4:12, 16:24])


def test_images_too_small(tmp_path):
    small = noise_image(7, 30)
    with pytest.raises(TooSmallError, match="is 7x30, smaller than the training size 8"):
        kept(small)
    larger = np.asarray(small.resize((8, 34), Image.Resampling.LANCZOS))
    assert np.array_equal(Preparation(8, too_small="enlarge")(encoded(small)), larger[13:21])
    assert np.array_equal(Preparation(8, "random", too_small="enlarge")(encoded(small)), larger)
    write_folder(tmp_path, {"good.png": encoded(BASE), "small.png": encoded(small)})
    with pytest.raises(UsageError, match=r"small\.png: is 7x30, .* 8 \(too_small: 'skip' leaves"):
        open_source(str(tmp_path), 8)
    source = open_source(str(tmp_path), 8, too_small="skip")
    assert source.names == ["good.png"]
    assert source.skipped == [("small.png", "is 7x30, smaller than the training size 8")]
    assert len(open_source(str(tmp_path), 8, too_small="enlarge")) == 2
    with pytest.raises(UsageError, match="none of the 2 images"):
        open_source(str(tmp_path), 16, too_small="skip")


def test_whether_images_fit_is_told_by_their_heads(tmp_path):
    """As opening them says, but for what is damaged further down."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"a.png": encoded(noise_image(12, 20)), "b.jpg": encoded(noise_image(20, 12), "JPEG", exif=exif), "c.png": b"no"}
    path = str(write_folder(tmp_path, files))
    for size in (8, 12, (20, 12), (12, 20), (8, 16), 13):
        for too_small in ("refuse", "skip", "enlarge"):
            found = []
            for look in (check_fit, functools.partial(open_source, cache="off")):
                try:
                    look(path, size, too_small=too_small)
                    found.append(None)
                except UsageError as error:
                    found.append(str(error))
            fits = size in (8, 12, (20, 12)) or too_small == "enlarge"
            assert (found[0] is None) == (found[1] is None) == fits, (size, too_small)
            assert found[0] == found[1] or too_small == "skip"
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:100])
    with pytest.raises(UsageError, match="a.png: is 12x20, smaller"):
        check_fit(path, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop": "left"}, "crop: expected centre or random, got 'left'"),
        ({"too_small": "pad"}, "too_small: expected refuse or skip or enlarge, got 'pad'"),
        ({"load_size": 7}, "load_size: expected an integer of at least the training size 8, got 7"),
        ({"size": 0}, "size: expected an integer of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        Preparation(**{"size": 8, **options})


def test_sizes_that_are_not_square(tmp_path):
    """A picture is scaled until it only just covers the size, and the middle is cut out."""
    wide, tall = noise_image(40, 16), noise_image(12, 30)
    lanczos = Image.Resampling.LANCZOS
    # 12 high, 24 wide: the height of the wide picture is the limit, and the width of the tall one
    assert np.array_equal(
        Preparation((12, 24))(encoded(wide)), np.asarray(wide.resize((30, 12), lanczos))[:, 3:27]
    )
    with pytest.raises(TooSmallError, match=r"is 12x30, smaller than the training size 24x12 \(width x height\)"):
        Preparation((12, 24))(encoded(tall))
    assert np.array_equal(
        Preparation((12, 24), too_small="enlarge")(encoded(tall)), np.asarray(tall.resize((24, 60), lanczos))[24:36]
    )
    assert Preparation((12, 24), "random")(encoded(wide)).shape == (16, 40, 3)
    assert Preparation((12, 24), "random", load_size=14)(encoded(wide)).shape == (14, 35, 3)
    assert Preparation((8, 8)) == Preparation(8)
    write_folder(tmp_path, {"a.png": encoded(wide), "b.png": encoded(noise_image(41, 30, 1))})
    source = open_source(str(tmp_path), (12, 24), crop="random")
    random = np.random.default_rng(0)
    index = np.zeros(200, np.int64)
    corners = source.corners(index, np.random.default_rng(0))
    assert (corners.min(0) == 0).all() and (corners.max(0) == (4, 16)).all()
    for cut, (top, left) in zip(source.images(index, random).numpy(), corners):
        assert np.array_equal(cut, np.asarray(wide)[top : top + 12, left : left + 24])
    assert Batches(source, 3)(0).shape == (3, 3, 12, 24)
    with pytest.raises(ValueError, match="rotate: expected square images"):
        Batches(source, 3, rotate=True)
