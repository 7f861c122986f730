"""Images that are not square, from the command line to the pixels: every command sees 32 rows of 64 columns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cips import load_generator
from cips.checkpoint import load_training
from cips.cli import main
from cips.pictures import to_uint8
from cips.training.trainer import SAMPLE_SEED
from pictures_made import encoded, noise_image, write_folder

SMALL = ["--width=8", "--n-layers=3", "--d-width=0.002", "--samples=4", "--batch=4", "--device=cpu", "--log-every=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures, 40 high and 80 to 85 wide, and where they lie."""
    images = [noise_image(80 + k, 40, k) for k in range(6)]
    path = write_folder(tmp_path_factory.mktemp("pictures") / "set", {f"{k}.png": encoded(i) for k, i in enumerate(images)})
    return images, path


def cells(path) -> list[np.ndarray]:
    """Of a grid of 2 x 2 with a pixel between."""
    with Image.open(path) as image:
        grid = np.asarray(image)
    assert grid.shape == (2 * 32 + 2, 2 * 64 + 2, 3)
    return [grid[top : top + 32, left : left + 64] for top in (0, 34) for left in (0, 66)]


def train(folder, out, *options) -> int:
    return main(["train", f"--data={folder}", "--size=32x64", *SMALL, f"--out={out}", *options])


@pytest.mark.parametrize(
    "regime",
    [
        ["--r1-every=2", "--augment=ada", "--augment-kinds=bgcfnc", "--ada-p=0.5"],
        ["--regime=patch", "--patch=16", "--dilation=1,2"],
        ["--regime=cylinder", "--turn=96"],
    ],
    ids=["full", "patch", "cylinder"],
)
def test_a_run_from_its_pictures_to_its_samples(pictures, tmp_path, capsys, regime):
    images, folder = pictures
    assert train(folder, tmp_path / "run", *regime, "--steps=5", "--sample-every=0") == 0
    assert "6 images of 32x64 px" in capsys.readouterr().err
    # the real pictures, scaled and cut by hand: 40 rows become 32
    by_hand = []
    for image in images:
        scaled = image.resize((round(image.width * 32 / 40), 32), Image.Resampling.LANCZOS)
        left = (scaled.width - 64) // 2
        by_hand.append(np.asarray(scaled)[:, left : left + 64])
    met = [[k for k, expected in enumerate(by_hand) if np.array_equal(cell, expected)] for cell in cells(tmp_path / "run/samples/real.png")]
    assert all(len(one) == 1 for one in met) and len({one[0] for one in met}) == 4

    # the samples: what the kept generator draws
    generator = load_generator(tmp_path / "run")
    z = torch.randn(4, generator.config.style_dim, generator=torch.Generator().manual_seed(SAMPLE_SEED))
    shown = cells(tmp_path / "run/samples/fake-00000005.png")
    with torch.no_grad():
        whole = to_uint8(generator(z, noise=SAMPLE_SEED))
    assert whole.shape == (4, 32, 64, 3)
    drawn = np.stack(shown).astype(int)
    if "--regime=cylinder" not in regime:
        assert np.abs(drawn - whole.numpy()).max() <= 1
    assert drawn.std() > 1, "not one colour"

    # in parts it is the same run
    assert train(folder, tmp_path / "parts", *regime, "--steps=3", "--sample-every=1") == 0
    assert train(folder, tmp_path / "parts", *regime, "--steps=5", "--resume=auto", "--sample-every=1") == 0
    one, two = (load_training(tmp_path / run / "checkpoints" / "step-00000005.pt") for run in ("run", "parts"))
    for part in ("generator", "discriminator", "average"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items()), part


def test_stages_grow_both_sides(pictures, tmp_path):
    stages = ["--stages=8x16:1,32x64:2", "--stage-table=grow"]
    assert main(["train", f"--data={pictures[1]}", *SMALL, *stages, f"--out={tmp_path / 'run'}"]) == 0
    generator = load_generator(tmp_path / "run" / "2-32x64")
    assert generator.config.size == (32, 64)
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["1-8x16", "2-32x64"]
    assert len(cells(tmp_path / "run" / "2-32x64" / "samples" / "fake-00000002.png")) == 4


def test_a_tall_picture_is_not_a_wide_one(pictures, tmp_path, capsys):
    path = pictures[1]
    assert main(["data", "check", str(path), "--size=64x32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["too_small"] == 6
    tall = ["train", f"--data={path}", "--size=64x32", *SMALL, "--steps=1", f"--out={tmp_path / 'run'}"]
    assert main(tall) == 2
    assert "is 80x40, smaller than the training size 32x64 (width x height)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
