"""The training loop: what a run leaves behind, resuming bit for bit, being killed, and stopping in time."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cips import UsageError, load_generator, presets
from cips.checkpoint import load_training, training_files
from cips.training import DivergenceError, TrainConfig, train, trainer
from cips.training.signals import stop_request
from cips.training.state import TrainingState
from pictures_made import encoded, write_folder, write_tar, write_zip

TINY = {
    "size": 8,
    "batch": 4,
    "width": 8,
    "n_layers": 3,
    "d_width": 1 / 512,
    "samples": 4,
    "device": "cpu",
    "log_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve small pictures."""
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f"{k}.png")
    return str(path)


def config(folder, out, **changes) -> TrainConfig:
    return TrainConfig(**{**TINY, "data": folder, "out": str(out), **changes})


def tensors(tree, prefix="") -> dict[str, torch.Tensor]:
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    )
    return {k: v for key, value in items for k, v in tensors(value, f"{prefix}/{key}").items()}


def assert_same_state(a, b) -> None:
    first, second = tensors(load_training(a)), tensors(load_training(b))
    assert first.keys() == second.keys() and len(first) > 50
    for key in first:
        assert torch.equal(first[key], second[key]), f"{key} differs"


def history(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("images_per_second", "memory_gib")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, tmp_path):
    whole = train(config(folder, tmp_path / "whole", steps=9, r1_every=4, sample_every=0), progress=False)
    # stops where an epoch and an R1 interval are under way; looks at samples all the time
    part = {"r1_every": 4, "sample_every": 1, "checkpoint_every": 1}
    train(config(folder, tmp_path / "parts", steps=2, **part), progress=False)
    train(config(folder, tmp_path / "parts", steps=5, resume="auto", **part), progress=False)
    torch.manual_seed(12345)  # the state of the process is not the run's
    parts = train(config(folder, tmp_path / "parts", steps=9, resume="auto", **part), progress=False)
    name = "checkpoints/step-00000009.pt"
    assert_same_state(whole.folder / name, parts.folder / name)
    assert history(whole.folder) == history(parts.folder)
    assert [line["step"] for line in history(parts.folder)] == list(range(1, 10))
    for z in (torch.randn(2, 128),):
        a, b = (load_generator(run.folder)(z, noise=1) for run in (whole, parts))
        assert torch.equal(a, b)


def test_what_a_run_leaves_behind(folder, tmp_path):
    result = train(
        config(folder, tmp_path / "run", steps=4, sample_every=2, checkpoint_every=1, keep=3), progress=False
    )
    names = sorted(p.relative_to(result.folder).as_posix() for p in result.folder.rglob("*") if p.is_file())
    assert [n for n in names if not n.startswith("tensorboard")] == [
        "checkpoints/step-00000002.pt",
        "checkpoints/step-00000003.pt",
        "checkpoints/step-00000004.pt",
        "config.yaml",
        "generator.safetensors",
        "metrics.jsonl",
        "samples/fake-00000000.png",
        "samples/fake-00000002.png",
        "samples/fake-00000004.png",
        "samples/real.png",
    ]
    with Image.open(result.folder / "samples" / "fake-00000004.png") as grid:
        grid = np.asarray(grid)
    assert grid.shape == (18, 18, 3), "2 x 2 images of 8, 2 white pixels between"
    # the grid shows the averaged generator, which is the one kept
    z = torch.randn(4, 128, generator=torch.Generator().manual_seed(1_000_003))
    with torch.no_grad():
        image = load_generator(result.folder)(z, noise=1_000_003)[3]
    expected = (image.permute(1, 2, 0) * 127.5 + 127.5).round().clamp(0, 255).numpy()
    assert np.abs(grid[10:, 10:].astype(float) - expected).max() <= 1
    kept, again = load_generator(result.folder), load_generator(result.folder)
    assert torch.equal(kept.w_mean, again.estimate_w_mean()), "the mean w of the averaged mapping network"
    assert set(history(result.folder)[0]) == {"step", "d_loss", "g_loss", "r1", "real_logit", "fake_logit"}
    if importlib.util.find_spec("tensorboard"):
        assert any(name.startswith("tensorboard/events") for name in names)
    kept = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert kept["steps"] == 4 and kept["preset"] == "small" and kept["dtype"] == "float32"


def start_cli(folder, out, *options) -> subprocess.Popen:
    flags = [f"--{key}={value}" for key, value in {**TINY, "data": folder, "out": out}.items()]
    command = [
        sys.executable,
        "-m",
        "cips",
        "train",
        "--checkpoint_every=1",
        "--sample_every=0",
        "--steps=100000",
    ]
    return subprocess.Popen([*command, *flags, *options], stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, out, steps, limit=120.0) -> None:
    began = time.monotonic()
    while not any(int(p.stem[5:]) >= steps for p in training_files(out / "checkpoints")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < limit, "no checkpoint in time"
        time.sleep(0.02)


def test_killed_at_random_moments_a_run_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    out, random = tmp_path / "killed", np.random.default_rng()
    done = 0
    for _ in range(2):
        process = start_cli(folder, out, "--resume=auto")
        wait_for_steps(process, out, done + 2)
        time.sleep(random.uniform(0, 0.3))  # checkpoints follow one another: often in the middle of writing
        process.kill()
        process.wait()
        process.stderr.close()
        done = int(training_files(out / "checkpoints")[0].stem[5:])
    steps = done + 2
    after = train(
        config(folder, out, steps=steps, resume="auto", checkpoint_every=1, sample_every=0), progress=False
    )
    whole = train(config(folder, tmp_path / "whole", steps=steps, sample_every=0), progress=False)
    assert_same_state(
        after.folder / f"checkpoints/step-{steps:08d}.pt", whole.folder / f"checkpoints/step-{steps:08d}.pt"
    )
    assert history(after.folder) == history(whole.folder)
    assert not list(out.rglob("*.tmp")), "nothing is left of what was being written"


def test_sigterm_saves_and_leaves_with_its_status(folder, tmp_path):
    process = start_cli(folder, tmp_path / "run", "--checkpoint_every=0")
    began = time.monotonic()
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(history(tmp_path / "run")) < 3:
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    (saved,) = training_files(tmp_path / "run" / "checkpoints")
    step = load_training(saved)["step"]
    assert step >= 3 and f"stopped by SIGTERM at step {step}, saved" in messages


@pytest.mark.parametrize("times", [1, 2], ids=["once", "and to the group"])  # as `timeout` and job managers do
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heeded_after_the_step(folder, tmp_path, monkeypatch, number, times):
    step = TrainingState.train_step

    def interrupted(self, real):
        if self.step == 2:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(self, real)

    before = signal.getsignal(number)
    monkeypatch.setattr(TrainingState, "train_step", interrupted)
    result = train(config(folder, tmp_path, steps=50, checkpoint_every=0), progress=False)
    assert (result.step, result.stopped_by) == (3, number)
    assert load_training(tmp_path / "checkpoints" / "step-00000003.pt")["step"] == 3
    assert signal.getsignal(number) is before


def test_a_second_signal_later_interrupts():
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        request.at -= 2  # seconds ago
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with stop_request(insistent=False) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        request.at -= 2
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_that_something_else_took_are_set_again():
    before = signal.getsignal(signal.SIGTERM)
    with stop_request() as request:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a compiler's that is loaded later
        request.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("what", ["loss", "logged loss", "weight", "weight at a checkpoint"])
def test_nan_stops_with_the_last_good_state(folder, tmp_path, monkeypatch, what):
    step = TrainingState.train_step

    def broken(self, real):
        metrics = step(self, real)
        if self.step == 4 and "loss" in what:
            metrics["g_loss"] = metrics["g_loss"] * math.nan
        if self.step == 4 and "weight" in what:
            with torch.no_grad():
                self.generator.mapping[1].weight[0, 0] = math.nan
        return metrics

    monkeypatch.setattr(TrainingState, "train_step", broken)
    if what == "logged loss":  # as on a GPU, where losses are looked at when they are logged
        def unwatched(run):
            for name, value in broken(run.state, run.batches(run.state.step)).items():
                run.pending[name].append(value)

        monkeypatch.setattr(trainer._Run, "train_step", unwatched)
    every = 2 if what == "weight at a checkpoint" else 3
    last, log = f"step-0000000{every}.pt", 4 if what == "logged loss" else 100
    said = "step 4: a weight is not finite" if "weight" in what else "step 4: g_loss is nan"
    with pytest.raises(DivergenceError, match=rf"stopped at {said}; the last good state is .*{last}"):
        train(config(folder, tmp_path, steps=50, checkpoint_every=every, log_every=log), progress=False)
    assert [p.name for p in training_files(tmp_path / "checkpoints")] == [last]
    assert all(
        t.isfinite().all()
        for t in tensors(load_training(training_files(tmp_path / "checkpoints")[0])).values()
    )


def test_a_damaged_checkpoint_is_passed_over(folder, tmp_path, capsys):
    train(config(folder, tmp_path, steps=4, checkpoint_every=2), progress=False)
    newest = tmp_path / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(config(folder, tmp_path, steps=5, checkpoint_every=2, resume="auto"), progress=False)
    assert "step-00000004.pt: not a whole training state" in capsys.readouterr().err
    assert [line["step"] for line in history(tmp_path)] == [1, 2, 3, 4, 5]


def test_refusals_before_the_first_step(folder, tmp_path):
    done = tmp_path / "done"
    train(config(folder, done, steps=1), progress=False)
    state = done / "checkpoints" / "step-00000001.pt"
    for changes, message in [
        ({"out": str(done)}, "holds a run; add --resume auto"),
        ({"out": str(done), "resume": "auto", "batch": 8}, "other options: batch was 4, now 8"),
        ({"out": str(done), "resume": "auto", "width": 16}, "width was 8, now 16"),
        ({"resume": str(tmp_path / "none.pt")}, "none.pt: no such file"),
        ({"data": str(tmp_path / "none")}, "data: expected 'earth'"),
        ({"size": 16}, "smaller than the training size 16"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"device": "toaster"}, "device: 'toaster' cannot be used"),
    ]:
        with pytest.raises(UsageError, match=message):
            train(
                config(**{"folder": folder, "out": tmp_path / "new", "steps": 2, **changes}), progress=False
            )
    assert not (tmp_path / "new").exists(), "nothing is written for a run that cannot begin"
    damaged = state.read_bytes()[:500]
    state.write_bytes(damaged)
    with pytest.raises(UsageError, match="no whole checkpoint in"):
        train(config(folder, done, steps=2, resume="auto"), progress=False)


@pytest.mark.parametrize("kind", ["folder", "zip", "shards"])
def test_every_kind_of_source_trains_alike(folder, tmp_path, capsys, kind):
    """The same pictures with a broken one among them, cut and turned at random: bit for bit the same run."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()} | {"y.png": b"no image"}
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 30, 3), dtype=np.uint8))
    files["z.png"] = encoded(wide)
    writers = {"folder": write_folder, "zip": write_zip, "shards": write_tar}
    path = writers[kind](tmp_path / {"folder": "set", "zip": "set.zip", "shards": "set.tar"}[kind], files)
    how = {"crop": "random", "rotate": True, "cache": str(tmp_path / "cache"), "workers": 2, "steps": 3}
    run = train(config(str(path), tmp_path / "run", **how), progress=True)
    said = capsys.readouterr().err
    assert f"data {path}: {'1 WebDataset shard' if kind == 'shards' else kind}, 14 images" in said
    assert "skipped 1 of 14 images:" in said and "y.png: cannot be read as an image" in said
    assert "13 images of 8 px" in said and list((tmp_path / "cache").glob("set-8-*.u8"))
    plain = write_folder(tmp_path / "plain", {name: data for name, data in files.items() if name != "y.png"})
    expected = train(config(str(plain), tmp_path / "expected", **how), progress=False)
    name = "checkpoints/step-00000003.pt"
    saved = [torch.load(each.folder / name, weights_only=True) for each in (run, expected)]
    weights = [tensors({"g": one["generator"], "d": one["discriminator"]}) for one in saved]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    other = train(config(str(plain), tmp_path / "other", **{**how, "rotate": False}), progress=False)
    turned = torch.load(other.folder / name, weights_only=True)["discriminator"]
    assert any(not torch.equal(turned[key], saved[0]["discriminator"][key]) for key in turned)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop": "left"}, "crop: expected centre or random"),
        ({"load_size": 4, "size": 8}, "load_size: expected an integer of at least the training size 8"),
        ({"too_small": "pad"}, "too_small: expected refuse or skip or enlarge"),
        ({"workers": 0}, "workers: expected an integer of at least 1"),
        ({"size": 48}, "size: expected a power of two"),
        ({"batch": 0}, "batch: expected an integer of at least 1"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"r1": -1.0}, "r1"),
        ({"d_width": 0.0}, "d_width"),
        ({"preset": "huge"}, "preset: expected auto, paper or official or base or ne or no-fourier or residual or sine or stylegan2 or small"),
        ({"dtype": "int8"}, "dtype: expected auto, float32 or bfloat16"),
    ],
)
def test_option_errors_name_the_option(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**changes)


def test_a_path_to_resume_from_goes_on_in_its_own_folder(folder, tmp_path):
    train(config(folder, tmp_path / "run", steps=2), progress=False)
    state = tmp_path / "run" / "checkpoints" / "step-00000002.pt"
    options = dataclasses.replace(
        config(folder, "", steps=3, resume=str(state)), out=None, width=None, batch=None
    )
    assert train(options, progress=False).folder == tmp_path / "run"
    with pytest.raises(UsageError, match="holds step-00000003.pt already"):
        train(options, progress=False)


@pytest.mark.gpu
def test_a_run_on_the_gpu_resumes(folder, tmp_path):
    options = {"device": "cuda", "width": 16, "sample_every": 2, "checkpoint_every": 2}
    train(config(folder, tmp_path, steps=4, **options), progress=False)
    result = train(config(folder, tmp_path, steps=6, resume="auto", **options), progress=False)
    assert result.step == 6 and [line["step"] for line in history(tmp_path)] == list(range(1, 7))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("preset", presets)
def test_every_preset_can_be_trained(preset):
    options = TrainConfig(preset=preset, device="cpu").resolve()
    assert options.batch >= 1
    assert options.generator_config() == dataclasses.replace(presets[preset], size=(64, 64))


def test_an_option_that_the_preset_forbids_is_named():
    with pytest.raises(UsageError, match="residual: expected .* an odd number of layers, got 4"):
        TrainConfig(preset="residual", device="cpu", n_layers=4).resolve().generator_config()
    with pytest.raises(UsageError, match="width: expected none with preset 'official'"):
        TrainConfig(preset="official", device="cpu", width=64).resolve().generator_config()
    assert TrainConfig(preset="ne", device="cpu", n_layers=4).resolve().generator_config().rgb_layers == (3,)
