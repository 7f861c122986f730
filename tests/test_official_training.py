"""A run of the official code gone on with here, and one of ours there: weights, averages and Adam's state, by the official loop."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cips import Discriminator, Generator, UsageError
from cips.checkpoint import load_training, save_training
from cips.cli import main
from cips.official_training import KEYS, to_official_training
from cips.training import TrainConfig
from cips.training.growth import start_from, with_its_architecture
from cips.training.state import TrainingState
from official_formulas import OfficialGenerator
from test_official_discriminator import make
from test_recipes import BATCH, SIZE, OfficialSteps, begin

BEFORE, AFTER = 16, 4  # the first of those after has a penalty, as a new run's first step has


def images(count: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(count, BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def held(official: OfficialSteps) -> dict:
    """What the official code saves."""
    d = {key.replace("/", "."): value.detach() for key, value in official.d.items()}
    d = {key: d.get(key, official.kernels.get(key)) for key in make(seed=1)}
    return copy.deepcopy(
        {
            "g": official.g.state_dict(),
            "d": d,
            "g_ema": official.average.state_dict(),
            "g_optim": official.g_optimizer.state_dict(),
            "d_optim": official.d_optimizer.state_dict(),
        }
    )


def step_both(state: TrainingState, official: OfficialSteps, reals: torch.Tensor) -> None:
    for k, real in enumerate(reals):
        torch.manual_seed(500 + k)
        ours = {key: value.item() for key, value in state.train_step(real).items()}
        torch.manual_seed(500 + k)
        theirs = official.step(real)
        assert ("r1" in ours) == ("r1" in theirs)
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-3), f"{key} of step {k}"


def assert_agree(state: TrainingState, official: OfficialSteps, limit: float = 1e-3) -> None:
    for ours, theirs in (
        (state.generator.to_official(), official.g.state_dict()),
        (state.average.module.to_official(), official.average.state_dict()),
        (state.discriminator.to_official(), {k.replace("/", "."): v for k, v in official.d.items()}),
    ):
        for key, value in theirs.items():
            # in the mean over a tensor: Adam makes a step of full length of a gradient that is zero but for rounding
            error, size = ((t.double().square().mean().sqrt()) for t in (ours[key] - value, value))
            assert error <= limit * (1 + size), f"{key}: RMS error {error:.2e} of {size:.2e}"


@pytest.fixture(scope="module")
def run() -> OfficialSteps:
    """The official loop after `BEFORE` steps; not to be stepped."""
    _, official = begin("official")
    for k, real in enumerate(images(BEFORE)):
        torch.manual_seed(100 + k)
        official.step(real)
    return official


@pytest.fixture
def file(run, tmp_path) -> str:
    path = tmp_path / "000016.pt"
    torch.save(held(run), path)
    return str(path)


def fresh(file: str, **options) -> TrainingState:
    """As `cips train --init FILE --size 16` makes it: everything else is told by the file."""
    config = TrainConfig(init=file, **{"size": SIZE, "batch": BATCH, "device": "cpu", **options})
    torch.manual_seed(7)
    return TrainingState(with_its_architecture(config).resolve())


def test_the_official_steps_go_on(run, file):
    official = copy.deepcopy(run)
    # the copy's optimisers must be those of the copied parameters
    for name, parameters in (("g_optimizer", official.g.parameters()), ("d_optimizer", official.d.parameters())):
        optimizer = torch.optim.Adam(parameters, **{k: getattr(run, name).defaults[k] for k in ("lr", "betas", "eps")})
        optimizer.load_state_dict(copy.deepcopy(getattr(run, name).state_dict()))
        setattr(official, name, optimizer)
    state = fresh(file)
    assert state.config.recipe == "official" and state.config.lookup == "compat"
    line = start_from(state, file)
    assert f"starting from the networks of {file} (step 16)" in line and "had" not in line and "new" not in line
    assert_agree(state, official, 0)
    before = copy.deepcopy(official.average.state_dict())
    step_both(state, official, images(AFTER, seed=3))
    assert_agree(state, official)
    # the steps are long enough for the comparison to mean something, and the moments matter in them
    moved = [(official.average.state_dict()[key] - value).abs().max() for key, value in before.items()]
    assert min(moved) > 1e-6
    bare = fresh(file)
    start_from(bare, file)
    for optimizer in (bare.g_optimizer, bare.d_optimizer):
        optimizer.state.clear()
    for k, real in enumerate(images(AFTER, seed=3)):
        torch.manual_seed(500 + k)
        bare.train_step(real)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_agree(bare, official)


def test_moments_come_with_their_weights_and_go_back_bit_for_bit(file):
    saved = torch.load(file, weights_only=True)
    state = fresh(file)
    start_from(state, file)
    # by hand for the three whose form differs: the table, a weight and a scalar; all others by the way back
    keys = list(saved["g"])
    by_key = {key: saved["g_optim"]["state"][number] for number, key in enumerate(keys)}
    ours = {key: state.g_optimizer.state[p] for key, p in state.generator.named_parameters()}
    for moment in ("exp_avg", "exp_avg_sq"):
        found = ours["encoding.table.weight"][moment]
        assert torch.equal(found, by_key["emb.input"][moment][0].permute(1, 2, 0)) and found.std() > 0
        assert torch.equal(ours["synthesis.layers.3.weight"][moment], by_key["linears.2.conv.weight"][moment][0, :, :, 0, 0])
        assert torch.equal(ours["synthesis.layers.3.noise_strength"][moment], by_key["linears.2.noise.weight"][moment][0])
    d_steps = {float(value["step"]) for value in state.d_optimizer.state.values()}
    assert {float(value["step"]) for value in ours.values()} == {16.0} and d_steps == {17.0}
    # a fused Adam takes moments that lie in memory as their parameters do, and counts of their own
    for optimizer in (state.g_optimizer, state.d_optimizer):
        for parameter, value in optimizer.state.items():
            assert value["exp_avg"].stride() == value["exp_avg_sq"].stride() == parameter.stride()
        assert len({value["step"].data_ptr() for value in optimizer.state.values()}) == len(optimizer.state)
    back = to_official_training("run", state.state_dict())
    assert list(back) == list(saved) == list(KEYS)
    for key in ("g", "d", "g_ema"):
        assert list(back[key]) == list(saved[key])
        assert all(torch.equal(back[key][name], value) for name, value in saved[key].items())
    for key in ("g_optim", "d_optim"):
        assert back[key]["state"].keys() == saved[key]["state"].keys()
        for number, value in saved[key]["state"].items():
            assert back[key]["state"][number]["step"] == value["step"]
            for moment in ("exp_avg", "exp_avg_sq"):
                found = back[key]["state"][number][moment]
                assert torch.equal(found, value[moment]) and found.is_contiguous()
        (theirs,), (group,) = saved[key]["param_groups"], back[key]["param_groups"]
        assert group["params"] == theirs["params"]
        assert (group["lr"], *group["betas"], group["eps"]) == pytest.approx((theirs["lr"], *theirs["betas"], theirs["eps"]), rel=1e-12)


def test_the_official_code_goes_on_from_a_run(tmp_path, capsys):
    """Our steps, `cips convert`, the official loop's own loading, and further steps of both."""
    state, official = begin("official")
    for k, real in enumerate(images(BEFORE, seed=4)):
        torch.manual_seed(100 + k)
        state.train_step(real)
    path = save_training(tmp_path / "checkpoints", state.step, state.state_dict())
    out = tmp_path / "000016.pt"
    assert main(["convert", str(path), str(out)]) == 0
    assert "a training checkpoint of the official code" in capsys.readouterr().out
    saved = torch.load(out, weights_only=True)
    official.g.load_state_dict(saved["g"])
    official.average.load_state_dict(saved["g_ema"])
    with torch.no_grad():
        for key, value in official.d.items():
            value.copy_(saved["d"][key.replace("/", ".")])
    official.g_optimizer.load_state_dict(saved["g_optim"])
    official.d_optimizer.load_state_dict(saved["d_optim"])
    official.iteration = 16
    assert_agree(state, official, 0)
    step_both(state, official, images(AFTER, seed=5))
    assert_agree(state, official)
    assert main(["convert", str(path), str(out), "--size=9"]) == 2
    assert "size: expected none towards the official form" in capsys.readouterr().err
    damaged = load_training(path)
    del damaged["average"]
    broken = save_training(tmp_path / "broken", 1, damaged)
    assert main(["convert", str(broken), str(tmp_path / "x.pt")]) == 2
    assert "step-00000001.pt: key 'average' is missing" in capsys.readouterr().err and not (tmp_path / "x.pt").exists()


def test_states_of_older_versions_and_of_several_processes(run, tmp_path):
    """Steps as plain numbers, states by the address of their parameter, keys with `module.`, a parameter without gradients."""
    saved = held(run)
    for key in ("g", "d", "g_ema"):
        saved[key] = {f"module.{name}": value for name, value in saved[key].items()}
    for key in ("g_optim", "d_optim"):
        adam = saved[key]
        address = {number: 139_000_000 - 97 * number for number in adam["param_groups"][0]["params"]}
        adam["param_groups"][0]["params"] = list(address.values())
        adam["state"] = {address[n]: {**value, "step": int(value["step"])} for n, value in adam["state"].items()}
    absent = list(saved["g"]).index("module.emb.input")
    del saved["g_optim"]["state"][saved["g_optim"]["param_groups"][0]["params"][absent]]
    torch.save(saved, tmp_path / "000016.pt")
    state = fresh(str(tmp_path / "000016.pt"))
    start_from(state, tmp_path / "000016.pt")
    expected = held(run)
    back = to_official_training("run", state.state_dict())
    assert absent not in back["g_optim"]["state"]
    for key in ("g_optim", "d_optim"):
        for number, value in back[key]["state"].items():
            assert value["step"] == expected[key]["state"][number]["step"]
            assert torch.equal(value["exp_avg_sq"], expected[key]["state"][number]["exp_avg_sq"])


@pytest.mark.parametrize("residual", [False, True])
def test_the_architecture_is_the_files(tmp_path, residual):
    """Without a word about the networks: widths that taper, residual blocks, short latents; a whole run, resumed."""
    torch.manual_seed(0)
    g = OfficialGenerator(8, (8, 8, 4), residual=residual, fourier=6, table=5, style_dim=12, mapping=3).randomise()
    d = make((8, 16), seed=1)
    parameters = [value for key, value in d.items() if "kernel" not in key]
    adams = [torch.optim.Adam(values, 0.5, (0.0, 0.9)).state_dict() for values in (g.parameters(), parameters)]
    saved = {"g": g.state_dict(), "d": d, "g_ema": g.state_dict(), "g_optim": adams[0], "d_optim": adams[1]}
    torch.save(saved, tmp_path / "000000.pt")
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    out = tmp_path / "run"
    options = [f"--data={tmp_path}", f"--out={out}", "--size=8", "--batch=2", "--device=cpu", "--samples=1", "--sample_every=0"]
    options += ["--cache=off", f"--init={tmp_path / '000000.pt'}"]
    assert main(["train", *options, "--steps=1"]) == 0
    state = load_training(out / "checkpoints" / "step-00000001.pt")
    assert state["generator_config"] == Generator.from_official(g.state_dict()).config.to_dict()
    assert state["discriminator_config"] == Discriminator.from_official(d).config.to_dict()
    assert json.loads(state["config"]["architecture"])["residual"] == residual and state["config"]["recipe"] == "official"
    (tmp_path / "000000.pt").unlink()
    assert main(["train", *options, "--steps=2", "--resume=auto"]) == 0
    assert (out / "checkpoints" / "step-00000002.pt").is_file()
    bigger = [f"--data={tmp_path}", f"--out={tmp_path / 'b'}", "--architecture={\"colour\": 1}", "--device=cpu"]
    assert main(["train", *bigger]) == 2


def test_a_discriminator_that_sees_coordinates_goes_on_as_one(tmp_path):
    """Sixteen steps of the official loop without --img2dis, then four in it and here; resumed without a word, as begun."""
    _, official = begin("official", channels=5)
    for k, real in enumerate(images(BEFORE)):
        torch.manual_seed(100 + k)
        official.step(real)
    path = tmp_path / "000016.pt"
    torch.save(held(official), path)
    state = fresh(str(path))
    assert state.config.d_coords and state.discriminator.config.in_channels == 5
    start_from(state, path)
    step_both(state, official, images(AFTER, seed=9))
    assert_agree(state, official)
    with pytest.raises(UsageError, match="its discriminator has another architecture: in_channels is 5, here 3"):
        start_from(fresh(str(path), d_coords=False), path)
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(tmp_path / "0.png")
    options = [f"--data={tmp_path}", f"--out={tmp_path / 'run'}", f"--init={path}", "--cache=off", "--device=cpu", "--samples=1"]
    options += [f"--size={SIZE}", "--batch=2"]
    assert main(["train", *options, "--steps=1"]) == 0
    path.unlink()
    assert main(["train", *options, "--steps=2", "--resume=auto"]) == 0


def test_other_settings_of_adam_are_told(run, tmp_path):
    saved = held(run)
    saved["g_optim"]["param_groups"][0]["lr"] = 0.5
    torch.save(saved, tmp_path / "000016.pt")
    state = fresh(str(tmp_path / "000016.pt"))
    assert start_from(state, tmp_path / "000016.pt").endswith("; its g_optimizer had lr 0.5 (here 0.0016)")


class Own:
    pass


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("d"), "key 'd' is missing; a run is gone on with from g, d, g_ema, g_optim, d_optim"),
        (lambda s: s.update(g_optim=3), "key 'g_optim': expected a state dict, got int"),
        (lambda s: s["g"].pop("linears.2.conv.weight"), "g: key 'linears.2.conv.weight' is missing"),
        (lambda s: s["d"].pop("final_conv.0.weight"), "d: key 'final_conv.0.weight' is missing"),
        (lambda s: s.update(g=s["d"]), "g: not a generator of the official CIPS code"),
        (lambda s: s.update(g_ema={**s["g_ema"], "emb.input": torch.zeros(1, 8, 32, 32)}), "key 'g_ema': expected the architecture"),
        (lambda s: s["g_optim"].pop("state"), "g_optim: key 'state' is missing"),
        (lambda s: s["g_optim"]["param_groups"][0]["params"].pop(), "g_optim: key 'param_groups': expected"),
        (lambda s: s["d_optim"].update(param_groups=[{}]), "d_optim: key 'param_groups': not the state of an optimiser"),
        (lambda s: s["d_optim"]["state"].update({999: {}}), "d_optim: key 'state': parameter 999 is in no group"),
        (lambda s: s["d_optim"]["state"][0].pop("exp_avg"), "d_optim: state of 'convs.0.0.weight': expected Adam's step"),
        (lambda s: s["g_optim"]["state"][2].update(exp_avg=torch.zeros(2)), "g_optim: state of 'emb.input': key 'exp_avg': expected"),
        (lambda s: s["g_optim"]["state"][2].update(step="x"), "g_optim: state of 'emb.input': key 'step': expected a number"),
        (lambda s: (s.update(s["g"]), [s.pop(key) for key in KEYS]), "key 'g' is missing; a run is gone on with from g, d,"),
        (lambda s: s["g"].update({"conv1.bias": torch.zeros(1, 8, 1, 1)}), "g: key 'conv1.bias': expected leaky ReLUs"),
        (lambda s: s.update(args=Own()), "it holds more than tensors and numbers"),
    ],
)
def test_files_that_cannot_serve_change_nothing_and_have_status_2(run, tmp_path, capsys, change, message):
    saved = held(run)
    change(saved)
    path = tmp_path / "000016.pt"
    torch.save(saved, path)
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(tmp_path / "0.png")
    arguments = [f"--data={tmp_path}", f"--out={tmp_path / 'run'}", f"--init={path}", "--cache=off", "--device=cpu"]
    assert main(["train", *arguments, f"--size={SIZE}", "--batch=2"]) == 2
    said = capsys.readouterr().err
    error = next(line for line in said.splitlines() if line.startswith("cips: error: "))
    assert str(path) in error and message in error, said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "paper"}, "its generator has another architecture: style_dim is 16, here 512"),
        ({"d_width": 1 / 256}, "its discriminator has another architecture: width is"),
        ({"size": 8}, "has 16x16 points and cannot shrink to 8x8"),
    ],
)
def test_another_architecture_is_refused(file, options, message):
    small = {"preset": "paper", "width": 8, "n_layers": 3} if "preset" in options else options
    state = fresh(file, **small)
    before = [p.clone() for p in (*state.generator.parameters(), *state.discriminator.parameters())]
    with pytest.raises(UsageError, match=message):
        start_from(state, file)
    after = (*state.generator.parameters(), *state.discriminator.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after))
