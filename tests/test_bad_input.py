"""What `cips train` does with data and options that are not as they should be: a line before the first step, or the
conversion that docs/data.md describes, seen in the pictures that a run shows as real.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cips.cli import main
from pictures_made import encoded, noise_image, write_folder

TINY = ["--size=16", "--width=8", "--n-layers=3", "--d-width=0.002", "--samples=4", "--batch=4", "--device=cpu"]
BASE = noise_image(16, 16)
PIXELS = np.asarray(BASE).astype(float)


def train(data, out, *options) -> int:
    return main(["train", f"--data={data}", *TINY, "--steps=0", f"--out={out}", *options])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the file's first row is the picture's right side
    return encoded(BASE, exif=exif)


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files, and the RGB that each stands for by the rules of its format."""
    random = np.random.default_rng(5)
    grey = random.integers(0, 256, (16, 16), dtype=np.uint8)
    alpha = random.integers(0, 256, (16, 16, 1), dtype=np.uint8)
    deep = random.integers(0, 2**16, (16, 16), dtype=np.uint16)
    inks = random.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    indices, colours = random.integers(0, 4, (16, 16), dtype=np.uint8), random.integers(0, 256, (4, 3), dtype=np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette(colours.tobytes())
    light = 255 - inks.astype(float)
    three = (1, 1, 3)
    return {
        "grey": (encoded(Image.fromarray(grey)), np.tile(grey[:, :, None], three)),
        "alpha": (
            encoded(Image.fromarray(np.concatenate((np.asarray(BASE), alpha), 2))),
            PIXELS * (alpha / 255) + 255 * (1 - alpha / 255),
        ),
        "palette": (encoded(palette), colours[indices]),
        "16 bit": (encoded(Image.fromarray(deep)), np.tile(deep[:, :, None] / 257, three)),
        "CMYK": (encoded(Image.fromarray(inks, "CMYK"), "TIFF"), light[:, :, :3] * light[:, :, 3:] / 255),
        "EXIF": (turned(), np.rot90(PIXELS, -1)),
    }


@pytest.mark.parametrize("kind", ["grey", "alpha", "palette", "16 bit", "CMYK", "EXIF"])
def test_odd_pictures_are_converted(tmp_path, kind):
    """One image, too: it fills the batch."""
    data, expected = odd_pictures()[kind]
    folder = write_folder(tmp_path / "set", {f"a.{'tif' if kind == 'CMYK' else 'png'}": data})
    assert train(folder, tmp_path / "run") == 0
    with Image.open(tmp_path / "run" / "samples" / "real.png") as image:
        grid = np.asarray(image).astype(float)
    for top in (0, 18):
        for left in (0, 18):
            assert np.abs(grid[top : top + 16, left : left + 16] - expected).max() <= 1.01


def test_truncated_files_are_named_and_left_out(tmp_path, capsys):
    whole = {name: encoded(noise_image(32, 32, 1), kind) for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.gif", "GIF"))}
    files = {"good.png": encoded(BASE), "none.png": b"", **{name: data[: len(data) // 2] for name, data in whole.items()}}
    assert train(write_folder(tmp_path / "set", files), tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "skipped 4 of 5 images:" in said and "1 images of 16 px" in said
    for name in ("a.png", "b.jpg", "c.gif", "none.png"):
        assert f"{name}: cannot be read as an image (" in said


def test_pictures_beyond_pils_limit_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "set", {"a.png": encoded(BASE), "b.png": encoded(noise_image(32, 32))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # twice as many are an error
    assert train(folder, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "b.png: cannot be read as an image (Image size (1024 pixels) exceeds limit of 600 pixels" in said


def test_what_cannot_be_is_one_line_before_anything_is_written(tmp_path, capsys):
    one = write_folder(tmp_path / "one", {"a.png": encoded(BASE)})
    small = write_folder(tmp_path / "small", {"a.png": encoded(BASE), "b.png": encoded(noise_image(10, 16))})
    broken = write_folder(tmp_path / "broken", {"a.png": encoded(BASE)[:60]})
    (tmp_path / "empty").mkdir()
    assert train(one, tmp_path / "run") == 0
    kept = tmp_path / "run" / "checkpoints" / "step-00000000.pt"
    assert kept.is_file()
    (tmp_path / "picture.yaml").write_bytes(encoded(BASE))
    out = tmp_path / "new"
    capsys.readouterr()
    for data, to, options, message in [
        (tmp_path / "empty", out, [], "data: no images in the folder"),
        (broken, out, [], "data: none of the 1 images in"),
        (one / "a.png", out, [], "one image; give the folder it lies in"),
        (small, out, ["--crop=random"], "b.png: is 10x16, smaller than the training size 16 (too_small: 'skip'"),
        (one, out, ["--regime=patch", "--patch=32"], "patch: expected at most the image's shorter side, 16 pixels, got 32"),
        (one, out, ["--regime=patch", "--patch=8", "--dilation=3"], "dilation: 8 pixels, 3 apart, reach over 22"),
        (one, out, ["--accumulate=3"], "batch: expected a multiple of 3 (1 processes x 3 parts each), got 4"),
        (one, tmp_path / "run", ["--resume=auto", "--width=16"], "step-00000000.pt: belongs to a run with other options: width was 8, now 16"),
        (one, out, [f"--init={tmp_path / 'run'}", "--width=16"], "its generator has another architecture: width is 8, here 16"),
        (one, out, [f"--init={one / 'a.png'}"], "a.png: not a whole training state (torch.save has not written it, or it is damaged)"),
        (one, out, [f"--resume={one / 'a.png'}"], "a.png: not a whole training state (torch.save has not written it, or it is damaged)"),
        (one, out, [f"--resume={tmp_path / 'run'}"], "resume: " + f"{tmp_path / 'run'} is a folder; --resume auto --out"),
        (one, out, ["--resume=always"], "resume: always: no such file; expected auto, never or"),
        (one, out, [f"--config={tmp_path / 'picture.yaml'}"], "config: expected a YAML or JSON file, got one that is no text"),
    ]:
        before = kept.read_bytes()
        assert train(data, to, *options) == 2, message
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("cips: error: ") and message in said.splitlines()[-1]
        assert "Traceback" not in said and "weights_only" not in said
        assert not out.exists() and kept.read_bytes() == before
