"""What a run keeps and what it says: policy of checkpoints, full disks, a folder in use, options and data that changed."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cips import UsageError
from cips.checkpoint import load_training, save_training, training_files
from cips.training import TrainConfig, start, train, trainer
from cips.training.log import RunLog
from cips.training.state import TrainingState

TINY = {
    "size": 8, "batch": 4, "width": 8, "n_layers": 3, "d_width": 1 / 512, "samples": 4, "device": "cpu", "log_every": 1,
    "sample_every": 0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Twelve small pictures."""
    path = tmp_path / "pictures"
    path.mkdir()
    random = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f"{k}.png")
    return path


def config(folder, out, **changes) -> TrainConfig:
    return TrainConfig(**{**TINY, "data": str(folder), "out": str(out), **changes})


def steps_kept(out: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in training_files(out / "checkpoints"))


def history(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("images_per_second", "memory_gib")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


@pytest.mark.parametrize(
    "keep, every, expected", [(1, 0, [9]), (2, 0, [8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9]), (20, 2, range(1, 10))]
)
def test_the_newest_and_every_kth_checkpoint_stay(tmp_path, keep, every, expected):
    for step in range(1, 10):
        save_training(tmp_path, step, {}, keep, every)
    assert [int(path.stem[5:]) for path in training_files(tmp_path)] == list(expected)[::-1]


def test_a_run_keeps_what_its_options_say(folder, tmp_path):
    train(config(folder, tmp_path / "run", steps=5, checkpoint_every=1, keep=1, keep_every=2), progress=False)
    assert steps_kept(tmp_path / "run") == [2, 4, 5]


def test_losses_not_logged_yet_are_kept_too(folder, tmp_path):
    """Logged every five steps, saved every three: the means cover the steps before the interruption as well."""
    often = {"log_every": 5, "checkpoint_every": 3, "r1_every": 2}
    train(config(folder, tmp_path / "whole", steps=10, **often), progress=False)
    train(config(folder, tmp_path / "parts", steps=10, **often), progress=False)
    for path in training_files(tmp_path / "parts" / "checkpoints"):
        if path.name != "step-00000009.pt":
            path.unlink()
    train(config(folder, tmp_path / "parts", steps=10, resume="auto", **often), progress=False)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    assert [line["step"] for line in history(tmp_path / "whole")] == [5, 10]
    each = tmp_path / "each"
    train(config(folder, each, steps=10, **{**often, "log_every": 1}), progress=False)
    for name in ("d_loss", "r1"):
        values = [line[name] for line in history(each)[5:] if name in line]
        assert history(tmp_path / "parts")[1][name] == pytest.approx(np.mean(values), rel=1e-4), name


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))
from cips.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits on the size of files")
def test_a_disk_that_takes_no_more_leaves_the_last_good_state(folder, tmp_path):
    out = tmp_path / "run"
    train(config(folder, out, steps=2), progress=False)
    (good,) = training_files(out / "checkpoints")
    before = good.read_bytes()
    assert len(before) > 1_000_000
    options = {**TINY, "data": folder, "out": out, "steps": 4, "resume": "auto"}
    command = [sys.executable, "-c", LIMITED, "train", *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    path = out / "checkpoints" / "step-00000004.pt"
    expected = f"cips: error: stopped at step 4: {path}: cannot be written: File too large; the last good state is {good}"
    assert said == expected
    assert [p.name for p in (out / "checkpoints").iterdir()] == [good.name] and good.read_bytes() == before
    assert train(config(folder, out, steps=4, resume="auto"), progress=False).step == 4


@pytest.mark.parametrize("what", ["log", "picture"])
def test_a_full_disk_elsewhere_stops_with_the_same_line(folder, tmp_path, monkeypatch, what):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(RunLog, {"log": "scalars", "picture": "pictures"}[what], full)
    step = 1 if what == "log" else 0
    with pytest.raises(UsageError, match=rf"stopped at step {step}: .*No space left.*no checkpoint had been written"):
        train(config(folder, tmp_path / "run", steps=3), progress=False)


def test_killed_between_its_two_files_a_run_ends_with_both_of_the_same_step(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    saving = trainer.checkpoint.save_training

    def killed(folder, step, *rest):
        if step == 4:
            raise SystemExit
        return saving(folder, step, *rest)

    monkeypatch.setattr(trainer.checkpoint, "save_training", killed)
    with pytest.raises(SystemExit):
        train(config(folder, out, steps=4, checkpoint_every=2), progress=False)
    monkeypatch.undo()
    assert steps_kept(out) == [2]
    train(config(folder, out, steps=4, resume="auto"), progress=False)
    state = load_training(training_files(out / "checkpoints")[0])
    with safe_open(out / "generator.safetensors", "pt") as file:
        assert json.loads(file.metadata()["notes"])["step"] == state["step"] == 4
        for key in file.keys():
            assert torch.equal(file.get_tensor(key), state["average"][key]), key


def test_a_folder_in_use_is_refused_and_free_again_afterwards(folder, tmp_path):
    out = tmp_path / "run"
    with start.sole_use(out), pytest.raises(UsageError, match=f"out: another process is training in {out}"):
        train(config(folder, out, steps=1), progress=False)
    assert not list(out.iterdir())
    assert train(config(folder, out, steps=1), progress=False).step == 1
    with start.sole_use(out):
        pass


def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="out: .*file/run cannot be made"):
        train(config(folder, tmp_path / "file" / "run", steps=1), progress=False)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rotate": True}, "rotate was False, now True"),
        ({"crop": "random"}, "crop was 'centre', now 'random'"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"d_coords": True}, "d_coords was False, now True"),
        ({"flip": False, "d_width": 1 / 256}, "flip was True, now False; d_width was 0.001953125, now 0.00390625"),
    ],
)
def test_a_checkpoint_of_other_options_names_them(folder, tmp_path, changes, said):
    train(config(folder, tmp_path / "run", steps=1), progress=False)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UsageError) as caught:
        train(config(folder, tmp_path / "run", steps=2, resume="auto", **changes), progress=False)
    path = tmp_path / "run" / "checkpoints" / "step-00000001.pt"
    assert str(caught.value) == f"{path}: belongs to a run with other options: {said}"
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_what_may_change_is_said(folder, tmp_path, capsys):
    train(config(folder, tmp_path / "run", steps=1), progress=False)
    Image.new("RGB", (8, 8)).save(folder / "new.png")
    changes = {"r1": 5.0, "lr": 0.001, "log_every": 2, "keep": 3}
    train(config(folder, tmp_path / "run", steps=2, resume="auto", **changes))
    said = capsys.readouterr().err
    assert "r1 was 10.0, from here on 5.0" in said and "lr was 0.002, from here on 0.001" in said
    assert "the data has changed since" in said
    assert "log_every was" not in said and "keep was" not in said
    train(config(folder, tmp_path / "run", steps=3, resume="auto", **changes))
    said = capsys.readouterr().err
    assert "from here on" not in said and "the data has changed" not in said


def test_with_another_number_of_processes_random_numbers_begin_anew(folder, tmp_path, capsys):
    """Not where a run of its own seed began, and the same whenever it is tried."""
    train(config(folder, tmp_path / "run", steps=2), progress=False)
    path = tmp_path / "run" / "checkpoints" / "step-00000002.pt"
    saved = load_training(path)
    saved["rng"] = saved["rng"] * 2
    state = TrainingState(config(folder, tmp_path / "run").resolve())
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (note,) = state.load_state_dict(saved, str(path))
        draws.append(torch.randn(4).tolist())
    assert note == "was 2 processes, from here on 1 processes on cpu: latents and noise are drawn anew"
    torch.manual_seed(0)
    assert draws[0] == draws[1] != torch.randn(4).tolist()


def test_a_batch_that_does_not_divide_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match=r"batch: expected a multiple of 3 \(1 processes x 3 parts each\), got 4"):
        train(config(folder, tmp_path / "run", steps=1, accumulate=3), progress=False)
    assert not (tmp_path / "run").exists()


def test_parts_without_whole_groups_are_announced(folder, tmp_path, capsys):
    train(config(folder, tmp_path / "run", steps=1, accumulate=2))
    assert "groups of 2 where one process would of 4" in capsys.readouterr().err
    train(config(folder, tmp_path / "other", steps=1, batch=8, accumulate=2))
    said = capsys.readouterr().err
    assert "1 processes x 2 parts of 4 images" in said and "groups of" not in said


def test_a_run_in_a_thread_leaves_signals_alone(folder, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config(folder, tmp_path / "run", steps=1), progress=False)))
    thread.start()
    thread.join()
    assert results[0].step == 1 and results[0].stopped_by is None


def test_a_log_that_cannot_be_opened_is_named(folder, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UsageError, match="^out: .*run cannot be written: Is a directory$"):
        train(config(folder, tmp_path / "run", steps=1), progress=False)
