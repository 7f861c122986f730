"""The commands that draw with a trained generator: the pictures they promise, the same from the same seed, and one line
for a mistake, with nothing half written.
"""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image

from cips import Generator, GeneratorConfig, UsageError, apps, load_generator, save_generator
from cips.apps.draw import STRIPS
from cips.cli import main
from cips.commands import COMMANDS
from cips.commands.foveate import saving
from cips.films import save_film
from cips.pictures import image_grid, to_uint8

CONFIG = GeneratorConfig(
    size=(12, 16), style_dim=8, mapping_layers=2, fourier_features=4, table_features=4, widths=(8, 6, 6)
)
GAP = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    generator = Generator(CONFIG).eval()
    with torch.no_grad():
        for layer in generator.synthesis.layers:
            layer.noise_strength.fill_(0.2)
    generator.estimate_w_mean(100)
    path = tmp_path_factory.mktemp("run") / "generator.safetensors"
    save_generator(path, generator)
    return str(path)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def latents(checkpoint, count, seed) -> tuple[Generator, torch.Tensor]:
    """What the commands draw with, made by hand."""
    return load_generator(checkpoint), torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def near(ours, images) -> bool:
    """Equal but for a pixel's rounding: a matrix product's last bits may depend on how many pixels share it."""
    images = images if images.dtype == torch.uint8 else to_uint8(images[None] if images.dim() == 3 else images)[0]
    return ours.shape == tuple(images.shape) and np.abs(ours.astype(int) - images.numpy().astype(int)).max() <= 1


@torch.no_grad()
def test_interpolate_writes_frames_that_end_in_the_samples(checkpoint, tmp_path, capsys):
    options = ["--count=3", "--frames=5", "--seed=4", "--psi=0.8", "--size=9x11", "--device=cpu"]
    assert main(["interpolate", checkpoint, "--out", str(tmp_path / "f"), *options]) == 0
    assert "5 frames through 3 latents in w" in capsys.readouterr().out
    g, z = latents(checkpoint, 3, 4)
    files = sorted((tmp_path / "f").iterdir())
    assert [p.name for p in files] == [f"{k:06d}.png" for k in range(5)]
    for k in range(3):
        image = g(z[k : k + 1], size=(9, 11), truncation=0.8, noise=4)
        assert near(pixels(files[2 * k]), image)
    assert main(["interpolate", checkpoint, "--out", str(tmp_path / "f.gif"), "--fps=25", *options]) == 0
    with Image.open(tmp_path / "f.gif") as film:
        assert film.n_frames == 5 and film.size == (11, 9) and film.info["duration"] == 40 and film.info["loop"] == 0


def test_a_film_is_an_mp4_where_ffmpeg_is(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [torch.full((33, 47, 3), 50 * k, dtype=torch.uint8) for k in range(5)]
    assert save_film(tmp_path / "film.mp4", frames, 10) == 5
    reader = ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    info = next(reader)
    assert info["size"] == (48, 34) and info["fps"] == 10
    levels = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert len(levels) == 5 and np.abs(np.array(levels) - 50 * np.arange(5)).max() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_film_that_fails_leaves_nothing(tmp_path, suffix):
    def frames():
        yield torch.zeros(4, 4, 3, dtype=torch.uint8)
        raise UsageError("no second frame")

    with pytest.raises(UsageError, match="no second frame"):
        save_film(tmp_path / f"film{suffix}", frames())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_mix_shows_a_b_and_their_mixtures(checkpoint, tmp_path, capsys):
    out = tmp_path / "mix.png"
    assert main(["mix", checkpoint, "--out", str(out), "--rows=2", "--groups=1,2,1+2", "--seed=3", "--device=cpu"]) == 0
    assert "groups 1, 2, 1+2" in capsys.readouterr().out
    g, z = latents(checkpoint, 4, 3)
    rows = []
    for a, b in g.styles(z).unflatten(0, (2, 2)):
        # three layers and one ToRGB: group 1 is the first layer, group 2 the rest
        for plus in ((a, a, a, a), (b, b, b, b), (b, a, a, a), (a, b, b, b), (b, b, b, b)):
            rows.append(to_uint8(g(torch.stack(plus)[None], input_is_w=True, noise=3)))
    grid = image_grid(torch.cat(rows), columns=5)
    assert near(pixels(out), grid)
    large = tmp_path / "large.png"
    options = ["--rows=2", "--groups=1,2,1+2", "--seed=3", "--device=cpu", "--magnify=3"]
    assert main(["mix", checkpoint, "--out", str(large), *options]) == 0
    assert np.array_equal(pixels(large), np.kron(pixels(out), np.ones((3, 3, 1), np.uint8)))


@torch.no_grad()
def test_panorama_blend_upscale_and_giga_are_the_library(checkpoint, tmp_path):
    g, z = latents(checkpoint, 3, 5)
    common = ["--seed=5", "--device=cpu", "--psi=0.7"]

    def drawn(name: str, *options: str) -> np.ndarray:
        out = tmp_path / options[-1] if options[-1].endswith(".tif") else tmp_path / f"{name}.png"
        options = tuple(option for option in options if not option.endswith(".tif"))
        assert main([name, checkpoint, "--out", str(out), *common, *options]) == 0
        return pixels(out)

    made = apps.panorama(g, z, size=(7, 20), angle=270, start=30, wrap="ring", truncation=0.7, noise=5)
    assert near(drawn("panorama", "--count=3", "--size=7x20", "--angle=270", "--start=30", "--wrap=ring"), made)
    mask = np.linspace(0, 255, 12 * 16).astype(np.uint8).reshape(12, 16)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    weights = apps.pixel_weights(torch.from_numpy(mask / np.float32(255)), 3, hard=True)
    made = apps.blend(g, z, weights, truncation=0.7, noise=5)
    assert near(drawn("blend", "--count=3", f"--mask={tmp_path / 'mask.png'}", "--edge=hard"), made)
    vertical = apps.pixel_weights(apps.mask_positions((9, 8), "vertical"), 2)
    g2, z2 = latents(checkpoint, 2, 5)
    made = apps.blend(g2, z2, vertical, truncation=0.7, noise=5)
    assert near(drawn("blend", "--mask=vertical", "--size=9x8"), made)
    g1, z1 = latents(checkpoint, 1, 5)
    found = apps.upscale(g1, z1[0], 3, truncation=0.7, noise=5)
    assert near(drawn("upscale", "--factor=3"), image_grid(to_uint8(torch.stack((found.lanczos, found.dense))), 2))
    pytest.importorskip("tifffile")
    image = g1(z1, size=(40, 24), truncation=0.7, noise=5)
    assert near(drawn("giga", "--size=40x24", "--tile=16", "g.tif"), image)


@torch.no_grad()
def test_foveate_shows_computed_pixels_above_and_filled_below(checkpoint, tmp_path, capsys):
    out = tmp_path / "f.png"
    assert main(["foveate", checkpoint, "--out", str(out), "--shares=20,100", "--gaze=0.5,-0.5", "--device=cpu"]) == 0
    said = capsys.readouterr()
    said = said.out + said.err
    assert "the whole image: computed in" in said and said.count("; filled in") == 2
    assert re.search(r"^20%: (38|39|4[0-2]) pixels computed in [\d.]+ s, [\d.]+ s (saved|more)", said, re.MULTILINE), said
    g, z = latents(checkpoint, 1, 0)
    own = to_uint8(g(z, noise=0))[0].numpy()
    shown = pixels(out)
    assert shown.shape == (2 * 12 + GAP, 2 * 16 + GAP, 3)
    assert np.abs(shown[12 + GAP :, 16 + GAP :].astype(int) - own).max() <= 1, "100% is the image"
    alone, filled = shown[:12, :16], shown[12 + GAP :, :16]
    computed = (alone != 255).any(-1)
    assert 0.15 * 192 < computed.sum() <= round(0.2 * 192) + 4
    assert np.abs(alone[computed].astype(int) - own[computed]).max() <= 1
    assert np.array_equal(alone[computed], filled[computed])


def test_the_time_saved_is_told_of_the_whole_image():
    assert saving(0.25, 1.0) == "0.750 s saved (75%)"
    assert saving(1.5, 1.0) == "0.500 s more than the whole image"


@pytest.mark.parametrize("name", [*COMMANDS, "sample"])
def test_there_is_a_bar_for_what_takes_long(checkpoint, tmp_path, capsys, monkeypatch, name):
    made = tqdm.tqdm.__init__
    monkeypatch.setattr(tqdm.tqdm, "__init__", lambda bar, *given, delay=0, **options: made(bar, *given, **options))
    if name in {"panorama", "blend", "upscale"}:  # of one picture
        monkeypatch.setitem(STRIPS, "cpu", 64)
    out = str(tmp_path / {"interpolate": "a.gif", "giga": "a.tif"}.get(name, "a.png"))
    options = {"interpolate": ["--frames=3"], "giga": ["--size=20", "--tile=16"], "sample": ["--count=2"]}.get(name, [])
    assert main([name, checkpoint, "--out", out, "--device=cpu", *options]) == 0
    assert re.search(r"0%\|.*\d/\d", capsys.readouterr().err)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_seed_gives_the_same_file(checkpoint, tmp_path, name):
    suffix = {"interpolate": ".gif", "giga": ".tif"}.get(name, ".png")
    options = {
        "interpolate": ["--frames=3"],
        "giga": ["--size=20", "--tile=16"],
        "foveate": ["--shares=30"],
        "mix": ["--rows=1"],
    }.get(name, [])
    for file, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = str(tmp_path / f"{file}{suffix}")
        assert main([name, checkpoint, "--out", path, f"--seed={seed}", "--device=cpu", *options]) == 0
    a, b, c = ((tmp_path / f"{file}{suffix}").read_bytes() for file in "abc")
    assert a == b != c
    silent = str(tmp_path / f"d{suffix}")
    assert main([name, checkpoint, "--out", silent, "--seed=1", "--noise=off", "--dtype=bfloat16", *options]) == 0
    assert (tmp_path / f"d{suffix}").read_bytes() != a


def test_bad_input_is_one_line_and_status_2_and_writes_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((5, 6), np.uint8)).save("mask.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    cases = [
        (["interpolate", checkpoint, "--count=1"], "count: expected an integer of at least 2, got 1"),
        (["interpolate", checkpoint, "--frames=1"], "frames: expected an integer of at least 2, got 1"),
        (["interpolate", checkpoint, "--space=x"], "space: expected w or z, got 'x'"),
        (["interpolate", checkpoint, "--fps=0"], "fps: expected a number above 0"),
        (["interpolate", checkpoint, "--out=film.avi"], "out: expected NAME.gif, NAME.mp4 or a folder, got film.avi"),
        (["mix", checkpoint, "--groups=1,3"], "groups: this generator has groups 1 to 2, got '3'"),
        (["mix", checkpoint, "--groups=coarse"], "groups: expected groups such as 6-8,3-5,1-2, got 'coarse'"),
        (["mix", checkpoint, "--groups=2-1"], "groups: this generator has groups 1 to 2"),
        (["mix", checkpoint, "--rows=0"], "rows: expected"),
        (["mix", checkpoint, "--magnify=0"], "magnify"),
        (["panorama", checkpoint, "--angle=400"], "angle: expected whole degrees from 1 to 360, got 400"),
        (["panorama", checkpoint, "--wrap=knot"], "wrap: expected mirror or ring, got 'knot'"),
        (["panorama", checkpoint, "--count=0"], "count: expected"),
        (["blend", checkpoint, "--mask=none.png"], "no such file: none.png"),
        (["blend", checkpoint, "--mask=text.png"], "mask: text.png is not a picture"),
        (["blend", checkpoint, "--mask=mask.png", "--size=9"], "mask: expected 9x9, as --size says, got 5x6: mask.png"),
        (["blend", checkpoint, "--edge=soft"], "edge: expected smooth or hard, got 'soft'"),
        (["blend", checkpoint, "--count=1"], "count: expected an integer of at least 2"),
        (["foveate", checkpoint, "--shares=0"], "shares: expected percents above 0 and at most 100, got 0"),
        (["foveate", checkpoint, "--shares=5,101"], "shares: expected percents above 0 and at most 100, got 101"),
        (["foveate", checkpoint, "--shares=half"], "shares: expected percents such as"),
        (["foveate", checkpoint, "--gaze=1"], "gaze: expected X,Y, each from -1 to 1, got '1'"),
        (["foveate", checkpoint, "--gaze=2,0"], "gaze: expected (x, y), each from -1 to 1"),
        (["foveate", checkpoint, "--size=1"], "size: expected at least 2 pixels a side, got 1x1"),
        (["upscale", checkpoint, "--factor=0.5"], "factor: expected a number of at least 1, got 0.5"),
        (["upscale", checkpoint, "--centre=0,3"], "centre: expected (x, y), each from -1 to 1"),
        (["giga", checkpoint, "--tile=100"], "tile: expected a positive multiple of 16, got 100"),
        (["giga", checkpoint, "--size=0"], "size: expected a number of at least 1 or HEIGHTxWIDTH, got '0'"),
        (["giga", checkpoint, "--out=g.png"], "out: expected NAME.tif or NAME.tiff, got g.png"),
    ]
    for name in COMMANDS:
        suffix = {"interpolate": "gif", "giga": "tif"}.get(name, "png")
        cases += [
            ([name, "none.safetensors"], "none.safetensors: no such file"),
            ([name, checkpoint, f"--out=mask.png/x.{suffix}"], "cannot be written: mask.png is not a folder"),
            ([name, checkpoint, "--noise=loud"], "noise: expected 'seed' or 'off', got 'loud'"),
            ([name, checkpoint, "--dtype=int8"], "dtype: expected float32 or bfloat16, got 'int8'"),
            ([name, checkpoint, "--device=toaster"], "device: 'toaster' cannot be used"),
            ([name, checkpoint, "--colour=red"], "--colour=red"),
        ]
        if name not in ("upscale", "giga"):
            cases.append(([name, checkpoint, "--size=4x4x4"], "size: expected a number of at least 1 or HEIGHTxWIDTH"))
        if name not in ("interpolate", "giga"):
            cases.append(([name, checkpoint, "--out=folder.png"], "folder.png: cannot be written: is a folder"))
            cases.append(([name, checkpoint, "--out=x.jpg"], "out: expected NAME.png, got x.jpg"))
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, (arguments, said)
        assert said.startswith("cips: error: ") and said.count("\n") == 1, said
        assert sorted(p.name for p in tmp_path.iterdir()) == before, arguments


def test_missing_packages_are_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, package, options in (
        ("foveate", "scipy.interpolate", []),
        ("giga", "tifffile", ["--size=20"]),
        ("interpolate", "imageio_ffmpeg", ["--out=film.mp4"]),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            assert main([name, checkpoint, *options]) == 2
        said = capsys.readouterr().err
        assert package.split(".")[0].replace("_", "-") in said and "pip install -e '.[apps]'" in said
    assert not list(tmp_path.iterdir())


def test_help_leads_from_training_to_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cips train --data earth --size 64" in out and "cips sample runs/earth-64" in out
    for name in ("train", "sample", "info", *COMMANDS):
        assert f" {name} " in out
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert f"Try: cips {name} runs/earth-64" in out
        for option in ("--out", "--seed", "--truncation", "--psi", "--noise", "--device", "--dtype"):
            assert option in out, (name, option)
