"""Regimes: the paper's offsets, the same places in real and generated images, and whole runs of each."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cips import Generator, UsageError, grids, load_generator
from cips.checkpoint import load_training
from cips.cli import main
from cips.config import presets
from cips.training import TrainConfig, train
from cips.training.mixing import StyleMixing
from cips.training.regimes import Cylinder, FullImage, Patches
from cips.training.state import TrainingState

TINY = {"size": 16, "batch": 4, "width": 8, "n_layers": 3, "d_width": 1 / 512, "samples": 2, "device": "cpu"}


def places(count: int, height: int, width: int) -> torch.Tensor:
    """Images whose red is each pixel's row and whose green is its column; blue is the image's number."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((rows, columns)).float().expand(count, -1, -1, -1)
    return torch.cat((pixels, torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, height, width)), 1)


@pytest.mark.parametrize("k, sigma", [(8, 1), (8, 2), (4, 4), (8, 3)])
def test_a_patch_is_the_papers(k, sigma):
    """P = G(u + i sigma, v + j sigma), with 0 <= u < W - (K - 1) sigma and 0 <= v < H - (K - 1) sigma, uniform."""
    height, width = 24, 32
    torch.manual_seed(0)
    seen = Patches((height, width), k, (sigma,))(places(6000, height, width))
    real = seen.real
    assert real.shape == (6000, 3, k, k) and seen.coords.shape == (6000, k, k, 2)
    v, u = real[:, 0, 0, 0], real[:, 1, 0, 0]
    steps = sigma * torch.arange(k)
    assert torch.equal(real[:, 0], (v[:, None] + steps)[:, :, None].expand(-1, -1, k))
    assert torch.equal(real[:, 1], (u[:, None] + steps)[:, None, :].expand(-1, k, -1))
    assert torch.equal(real[:, 2, 0, 0], torch.arange(6000.0)), "every image is cut out of itself"
    for corner, side in ((v, height), (u, width)):
        count = side - (k - 1) * sigma
        met = torch.bincount(corner.long(), minlength=count)
        assert len(met) == count, "0 <= u < W - (K - 1) sigma"
        expected = 6000 / count
        assert ((met - expected) ** 2 / expected).sum() < count + 5 * (2 * count) ** 0.5, "uniform (chi squared)"
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.05, "rows and columns are drawn apart"


def test_real_and_generated_patches_have_the_same_coordinates():
    full = grids.full(16, 24).permute(2, 0, 1)
    images = torch.cat((full, torch.zeros(1, 16, 24))).expand(50, -1, -1, -1)
    torch.manual_seed(0)
    seen = Patches((16, 24), 4, (1, 3))(images)
    assert torch.equal(seen.coords, seen.real[:, :2].permute(0, 2, 3, 1)), "bit for bit"
    rows = torch.tensor([[3, 5, 7]])
    assert torch.equal(grids.patches(rows, rows + 1, (16, 24))[0], grids.patch((16, 24), 3, 2, (3, 4)))


def test_each_step_draws_one_of_several_dilations():
    regime, images = Patches((16, 16), 4, (1, 2, 4)), places(3, 16, 16)
    torch.manual_seed(0)
    met = []
    for _ in range(300):
        seen = regime(images).real
        steps = seen[:, 0, 1, 0] - seen[:, 0, 0, 0]
        assert len(steps.unique()) == 1, "one for the batch"
        met.append(int(steps[0]))
    counts = np.bincount(met)
    assert set(np.flatnonzero(counts)) == {1, 2, 4} and counts[[1, 2, 4]].min() > 70


def test_a_generated_patch_is_part_of_the_full_image():
    torch.manual_seed(0)
    g = Generator(dataclasses.replace(presets["small"], size=(16, 24), width=8, n_layers=3)).eval()
    with torch.no_grad():
        for layer in g.synthesis.layers:
            layer.noise_strength.fill_(0.5)
        z = torch.randn(3, 128)
        whole = g(z, noise=7)
        seen = Patches((16, 24), 8, (2,))(torch.cat((places(3, 16, 24)[:, :2], whole[:, :1]), 1))
        patch = g(z, seen.coords, noise=7)
    torch.testing.assert_close(patch[:, 0], seen.real[:, 2], rtol=1e-5, atol=1e-5)


def test_a_cylinders_crops_start_anywhere_and_close():
    regime, real = Cylinder((8, 12), 40), places(4000, 8, 12)
    torch.manual_seed(0)
    seen = regime(real)
    assert seen.real is real, "real images as they are"
    grid = grids.cylinder(8, 40, wrap="ring")
    rolled = {grid.roll(-first, 1)[:, :12].numpy().tobytes(): first for first in range(40)}
    met = np.bincount([rolled[crop.numpy().tobytes()] for crop in seen.coords], minlength=40)
    assert met.min() > 60 and ((met - 100) ** 2 / 100).sum() < 40 + 5 * 80**0.5
    assert torch.equal(regime.shown(), grid[:, :12])
    with pytest.raises(UsageError, match="turn: expected at least the image's width of 12 columns, got 11"):
        Cylinder((8, 12), 11)


def test_the_full_image_is_left_alone():
    real = places(2, 8, 8)
    seen = FullImage((8, 8), "cpu")(real)
    assert seen.real is real and seen.coords is None


def test_a_part_of_a_sight_is_a_part_of_both():
    seen = Patches((16, 16), 4)(places(6, 16, 16))
    part = seen[1::2]
    assert len(part) == 3 and torch.equal(part.real, seen.real[1::2]) and torch.equal(part.coords, seen.coords[1::2])
    assert FullImage((16, 16), "cpu")(places(6, 16, 16))[:2].coords is None


REGIMES = {
    "full": {},
    "not square": {"size": "8x16"},
    "patch": {"regime": "patch", "patch": 8},
    "dilated patch": {"regime": "patch", "patch": 8, "dilation": "1,2", "size": "16x24", "table_size": "8x12"},
    "cylinder": {"regime": "cylinder", "turn": 40},
    "mixing": {"mixing": 0.9},
    "diffaug": {"augment": "diffaug"},
    "ada": {"augment": "ada", "ada_images": 40.0, "regime": "patch", "patch": 8},
    "all of ada": {"augment": "ada", "augment_kinds": "bgcfnc", "ada_p": 0.8, "size": "16x24"},
    "coordinates": {"d_coords": True, "size": "8x16"},
    "coordinates of patches": {"d_coords": True, "regime": "patch", "patch": 8, "dilation": 2, "size": "16x24"},
    "paper": {"recipe": "paper", "noise": False, "fourier_bias": False},
    "official": {"recipe": "official", "regime": "patch", "patch": 8},
}


@pytest.mark.parametrize("name", REGIMES)
def test_both_halves_of_a_step_see_the_same_places(name, monkeypatch):
    torch.manual_seed(0)
    config = TrainConfig(**{**TINY, **REGIMES[name], "r1_every": 1}).resolve()
    state = TrainingState(config)
    asked, judged = [], []
    forward, judge = Generator.forward, TrainingState.judge

    def generate(self, z, coords=None, **how):
        asked.append((coords, how))
        return forward(self, z, coords, **how)

    def look(self, images):
        judged.append(images)
        return judge(self, images)

    monkeypatch.setattr(Generator, "forward", generate)
    monkeypatch.setattr(TrainingState, "judge", look)
    height, width = config.image_size
    before = {key: p.detach().clone() for key, p in state.generator.named_parameters()}
    metrics = state.train_step(torch.rand(4, 3, height, width) * 2 - 1)
    expected = (8, 8) if config.regime == "patch" else (height, width)
    channels = 5 if config.d_coords else 3
    assert {tuple(each.shape) for each in judged} == {(4, channels, *expected)} and len(judged) == 4, "fake, real, R1, fake"
    assert len(asked) == 2
    (first, how), (second, _) = asked
    assert (first is None) == (second is None) == (config.regime == "full")
    assert first is None or (first is second and first.shape == (4, *expected, 2))
    if config.d_coords:
        places = grids.full(height, width) if first is None else first
        for each in judged:
            assert torch.equal(each[:, 3:], places.movedim(-1, -3).expand(4, -1, -1, -1)), "x, then y"
    assert how["noise"] == ("off" if name == "paper" else "fresh")
    assert how["lookup"] == ("compat" if name == "official" else "exact")
    assert all(value.isfinite() for value in metrics.values())
    assert ("augment_p" in metrics) == (name == "ada")
    still = [key for key, p in state.generator.named_parameters() if torch.equal(p, before[key])]
    assert all(config.noise is False and key.endswith("noise_strength") for key in still), still


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for k in range(6):
        Image.fromarray(random.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path / f"{k}.png")
    return str(path)


@pytest.mark.parametrize("name", ["dilated patch", "cylinder", "ada", "mixing"])
def test_a_run_resumes_bit_for_bit(folder, tmp_path, name):
    options = {**TINY, **REGIMES[name], "data": folder, "log_every": 1, "r1_every": 2, "sample_every": 0}
    whole = train(TrainConfig(**options, out=str(tmp_path / "whole"), steps=5), progress=False)
    train(TrainConfig(**options, out=str(tmp_path / "parts"), steps=3), progress=False)
    parts = TrainConfig(**options, out=str(tmp_path / "parts"), steps=5, resume="auto")
    train(parts, progress=False)
    a, b = (load_training(tmp_path / run / "checkpoints" / "step-00000005.pt") for run in ("whole", "parts"))
    for key in ("generator", "discriminator", "average", "augment"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key]) and a[key].keys() == b[key].keys()
    assert name != "ada" or a["augment"]["probability"] > 0 or a["augment"]["tally"][1] > 0
    # sample grids show whole images, or a crop of the cylinder
    height, width = parts.image_size
    with Image.open(tmp_path / "whole" / "samples" / "fake-00000005.png") as grid:
        assert grid.size == (2 * width + 2, height) or grid.size == (width, 2 * height + 2)
    assert load_generator(whole.folder).config.size == (height, width)
    if name == "dilated patch":
        with pytest.raises(UsageError, match="other options: patch was 8, now 16"):
            train(dataclasses.replace(parts, dilation=1, patch=16), progress=False)


def test_mixing_gives_later_layers_the_other_style():
    config = dataclasses.replace(presets["small"], n_layers=6)
    mixing = StyleMixing(config, 0.7, "cpu")
    torch.manual_seed(0)
    count = 6000
    w, other = torch.zeros(count, 4), torch.ones(count, 4)
    styles = mixing(w, other)
    layers, rgb = 6, config.rgb_layers
    assert styles.shape == (count, layers + len(rgb), 4) and rgb == (1, 3, 5)
    taken = styles[:, :, 0]
    assert (styles == taken[:, :, None]).all()
    own = taken[:, :layers]
    assert (own[:, 1:] >= own[:, :-1]).all() and (own[:, 0] == 0).all(), "from a layer on; never all"
    for k, after in enumerate(rgb):
        assert torch.equal(taken[:, layers + k], own[:, after]), "a ToRGB goes with the layer that it follows"
    cuts = np.bincount((layers - own.sum(1)).long(), minlength=7)
    assert abs(1 - cuts[6] / count - 0.7) < 0.02
    assert (abs(cuts[1:6] / count - 0.7 / 5) < 0.02).all() and cuts[0] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"regime": "patch"}, "patch: expected the pixels a side of a patch with regime patch, got none"),
        ({"regime": "patch", "patch": 32}, "patch: expected at most the image's shorter side, 16 pixels, got 32"),
        ({"regime": "patch", "patch": 12}, "patch: expected a power of two"),
        ({"regime": "patch", "patch": 8, "dilation": 3}, "reach over 22, more than .* of 16; expected at most 2"),
        ({"regime": "patch", "patch": 8, "dilation": "1,x"}, "dilation: expected integers of at least 1, as in '1,2,4'"),
        ({"patch": 8}, "patch: expected none with regime full"),
        ({"dilation": 2}, "dilation: expected 1 with regime full, got 2"),
        ({"regime": "patch", "patch": 8, "turn": 64}, "turn: expected none with regime patch"),
        ({"regime": "cylinder", "turn": 15}, "turn: expected at least the image's width of 16 columns, got 15"),
        ({"regime": "sphere"}, "regime: expected full or patch or cylinder, got 'sphere'"),
        ({"size": "16x18"}, "size: expected a longer side that is a multiple of 4"),
        ({"size": "16by16"}, "size: expected a number of at least 1 or HEIGHTxWIDTH"),
        ({"size": "16x32", "rotate": True}, "rotate: expected square images"),
        ({"table_size": "no"}, "table_size: expected a number"),
        ({"mixing": 1.5}, "mixing: expected a number from 0 to 1"),
        ({"augment": "blur"}, "augment: expected none or diffaug or ada, got 'blur'"),
        ({"augment_kinds": "colour"}, "augment_kinds: expected none with augment 'none'"),
        ({"augment": "ada", "augment_kinds": "blur"}, "augment_kinds: expected some of blit, geometry, colour"),
        ({"augment": "ada", "d_coords": True}, "augment: expected none with d_coords, .*, got 'ada'"),
        ({"augment": "ada", "ada_p": 2.0}, "ada_p: expected a number from 0 to 1"),
        ({"recipe": "mine"}, "recipe: expected auto, paper or official, got 'mine'"),
        ({"lookup": "near"}, "lookup: expected exact or compat, got 'near'"),
        ({"stages": "16:10,8:10"}, "stages: expected sizes that grow"),
        ({"stages": "16"}, "stages: expected SIZE:STEPS"),
        ({"stages": "20:5"}, "stages: expected a power of two"),
    ],
)
def test_option_errors_name_the_option(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{**TINY, **changes})


def test_images_smaller_than_the_whole_image_are_refused_though_the_patch_would_fit(folder, tmp_path):
    options = {**TINY, "size": 32, "regime": "patch", "patch": 8, "data": folder, "out": str(tmp_path / "new")}
    with pytest.raises(UsageError, match="is 24x16, smaller than the training size 32"):
        train(TrainConfig(**options, steps=1), progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", REGIMES)
def test_regimes_replay_as_graphs_without_waiting(name):
    """Twelve steps, the later ones replayed, against twelve eager ones, of which the later may not wait."""
    from cips.training.graphs import GraphedSteps

    options = {**TINY, **REGIMES[name], "device": "cuda", "dtype": "float32", "r1_every": 2}
    config = TrainConfig(**options).resolve()
    real = torch.rand(4, 3, *config.image_size, device="cuda", generator=torch.Generator("cuda").manual_seed(5)) * 2 - 1
    runs = []
    for graphed in (False, True):
        torch.manual_seed(0)
        state = TrainingState(config)
        step = GraphedSteps(state) if graphed else state.train_step
        torch.manual_seed(1)
        metrics = [step(real) for _ in range(6)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if graphed else "error")
        try:
            metrics += [step(real) for _ in range(6)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append((metrics, [*state.average.module.parameters(), *state.discriminator.parameters()]))
    for eager, replayed in zip(runs[0][0], runs[1][0]):
        assert eager.keys() == replayed.keys()
        for key in eager:
            torch.testing.assert_close(replayed[key], eager[key], rtol=1e-2, atol=1e-2)
    for eager, replayed in zip(runs[0][1], runs[1][1]):
        torch.testing.assert_close(replayed, eager, rtol=1e-2, atol=1e-2)


def test_from_the_command_line(folder, tmp_path, capsys):
    common = ["train", "--data", folder, "--batch=2", "--width=8", "--n-layers=3", "--d-width=0.002", "--samples=2"]
    common += ["--device=cpu", "--sample-every=0"]
    patch = ["--size=16x24", "--regime=patch", "--patch=8", "--dilation=1,2", "--steps=2", "--augment=ada"]
    assert main([*common, *patch, "--out", str(tmp_path / "patch")]) == 0
    kept = yaml.safe_load((tmp_path / "patch" / "config.yaml").read_text())
    assert (kept["size"], kept["patch"], kept["dilation"], kept["recipe"]) == ("16x24", 8, "1,2", "official")
    # the config beside a run makes it again
    again = ["train", "--config", str(tmp_path / "patch" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    a, b = (load_training(tmp_path / run / "checkpoints" / "step-00000002.pt") for run in ("patch", "again"))
    assert all(torch.equal(value, b["generator"][key]) for key, value in a["generator"].items())
    stages = ["--stages=8:1,16:2", "--regime=patch", "--patch=8", "--out", str(tmp_path / "stages")]
    assert main([*common, *stages]) == 0
    told = capsys.readouterr()
    assert "starting from the networks of" in told.err and "2-16: 2 steps" in told.out
    init = ["--size=16", "--steps=1", "--init", str(tmp_path / "stages" / "2-16"), "--out", str(tmp_path / "new")]
    assert main([*common, *init]) == 0
    assert "its table grown from 8x8 to 16x16; 7 tensors of the discriminator are new" in capsys.readouterr().err
    wider = [option for option in common if not option.startswith("--width")] + ["--width=16"]
    assert main([*wider, *init[:-1], str(tmp_path / "wider")]) == 2
    assert "another architecture: width is 8, here 16" in capsys.readouterr().err
    assert not (tmp_path / "wider").exists()
