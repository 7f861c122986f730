"""Watching a run: boards, the progress line, the options beside it, and metrics while it trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cips import UsageError, load_generator
from cips.checkpoint import load_training
from cips.cli import main
from cips.training import TrainConfig, progress, train
from cips.training.boards import finite
from cips.training.log import RunLog
from cips.training.state import TrainingState

TINY = {
    "size": 8, "batch": 4, "width": 8, "n_layers": 3, "d_width": 1 / 512, "samples": 4, "device": "cpu",
    "log_every": 1, "steps": 4, "sample_every": 2, "checkpoint_every": 2, "r1_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("watched")
    random = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f"{k}.png")
    return str(path)


def config(folder, out, **changes) -> TrainConfig:
    return TrainConfig(**{**TINY, "data": folder, "out": str(out), **changes})


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out, step) -> dict[str, torch.Tensor]:
    state = load_training(Path(out) / "checkpoints" / f"step-{step:08d}.pt")
    nets = {name: state[name] for name in ("generator", "discriminator", "average")}
    return {f"{name}/{key}": value for name, net in nets.items() for key, value in net.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and len(a) > 40 and all(torch.equal(a[key], b[key]) for key in a)


def test_tensorboard_has_what_the_lines_have_and_the_grids(folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config(folder, tmp_path), progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    names = {name for line in logged for name in line} - {"step"}
    assert (
        set(events.Tags()["scalars"])
        == names
        >= {"d_loss", "g_loss", "r1", "images_per_second", "memory_gib"}
    )
    for name in names:
        points = {event.step: event.value for event in events.Scalars(name)}
        assert points == pytest.approx(
            {line["step"]: line[name] for line in logged if name in line}, rel=1e-5
        )
    assert 0.01 < logged[-1]["memory_gib"] < 100
    assert [event.step for event in events.Images("fake")] == [0, 2, 4]
    written = (tmp_path / "samples" / "fake-00000004.png").read_bytes()
    with Image.open(tmp_path / "samples" / "fake-00000004.png") as png:
        grid = np.asarray(png)
    assert written and (events.Images("fake")[-1].height, events.Images("fake")[-1].width) == grid.shape[:2]


def test_sample_grids_come_from_fixed_seeds(folder, tmp_path):
    """The same weights give the same grid, however often it was looked at before."""
    train(config(folder, tmp_path / "a", sample_every=1), progress=False)
    train(config(folder, tmp_path / "b", sample_every=4), progress=False)
    grids = [(tmp_path / run / "samples" / "fake-00000004.png").read_bytes() for run in "ab"]
    assert grids[0] == grids[1]
    assert grids[0] != (tmp_path / "a" / "samples" / "fake-00000000.png").read_bytes(), "the run has learned"


def test_without_tensorboard_a_run_says_so_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(config(folder, tmp_path), progress=False).step == 4
    said = capsys.readouterr().err.splitlines()
    assert said == ["cips: tensorboard is not installed: metrics.jsonl only"]
    assert len(lines(tmp_path)) == 4 and not (tmp_path / "tensorboard").exists()


class FakeWandb(types.ModuleType):
    """The part of Weights & Biases in use, which writes down what it is told."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0
        self.Image = lambda array: ("image", array.shape)

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            define_metric=lambda *args, **kwargs: None, log=self.logged.append, finish=self.finish
        )

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    return fake


def test_weights_and_biases_gets_the_same_and_goes_on_with_its_run(folder, tmp_path, wandb):
    train(config(folder, tmp_path / "run", wandb="pixels"), progress=False)
    (start,) = wandb.started
    assert (start["project"], start["name"]) == ("pixels", "run")
    assert start["config"]["batch"] == 4 and wandb.finished == 1
    scalars = [entry for entry in wandb.logged if "d_loss" in entry]
    assert scalars == lines(tmp_path / "run")
    assert [entry["step"] for entry in wandb.logged if "fake" in entry] == [0, 2, 4]
    train(config(folder, tmp_path / "run", steps=5, resume="auto"), progress=False)
    assert wandb.started[1]["project"] == "pixels", "the run's options say so"
    assert wandb.started[1]["id"] == start["id"] and wandb.started[1]["resume"] == "allow"
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {
        "id": start["id"],
        "project": "pixels",
    }


def test_weights_and_biases_that_is_not_there_stops_a_run_before_it_begins(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb: project 'p' needs .* not installed: pip install wandb"):
        train(config(folder, tmp_path / "run", wandb="p"), progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="wandb: expected the name of a project"):
        train(config(folder, tmp_path / "run", wandb=" "), progress=False)


def test_weights_and_biases_that_does_not_answer_is_an_error_of_one_line(
    folder, tmp_path, wandb, monkeypatch
):
    def refuse(**_):
        raise FakeWandb.Error("no API key\nlong story")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match="wandb: no API key; WANDB_MODE=offline keeps the run here"):
        train(config(folder, tmp_path / "run", wandb="p"), progress=False)


def test_the_progress_line(folder, tmp_path, capsys):
    train(config(folder, tmp_path, steps=5), progress=True)
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert "5/5" in last and "<" in last, "steps done; time spent and left"
    shown = last[last.index("img/s ") :]
    values = {part.split()[0]: float(part.split()[1]) for part in shown.rstrip("]").split(", ")}
    assert list(values) == ["img/s", "D", "G", "R1", "GiB"]
    logged = lines(tmp_path)
    for name, title in progress.SHOWN.items():
        expected = [line[name] for line in logged if name in line][-1]  # R1: of step 4, the last that had one
        assert values[title] == pytest.approx(expected, rel=1e-3), title
    assert "r1" not in logged[-1]


def test_memory_counts_what_is_taken():
    before = progress.peak_memory(torch.device("cpu"))
    block = np.ones(2**26)  # half a GiB
    assert progress.peak_memory(torch.device("cpu")) >= before
    assert block.nbytes / 2**30 <= progress.peak_memory(torch.device("cpu")) < 1000


def test_lines_hold_no_values_that_json_has_not(tmp_path):
    log = RunLog(tmp_path, 0)
    log.scalars(3, {"a": float("nan"), "b": float("inf"), "c": 1.23456789})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "c": 1.23457}\n'
    assert finite({"x": 2.0}) == {"x": 2.0}


def test_the_options_beside_a_run_make_the_same_run(folder, tmp_path, capsys):
    options = {**TINY, "data": folder, "seed": 3, "lr": 1e-5, "r1": 0.5, "rotate": True, "crop": "random"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    assert main(["train", *flags, f"--out={tmp_path / 'first'}"]) == 0
    written = tmp_path / "first" / "config.yaml"
    assert main(["train", f"--config={written}", f"--out={tmp_path / 'second'}"]) == 0
    assert same(weights(tmp_path / "first", 4), weights(tmp_path / "second", 4))
    first, second = (
        yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("first", "second")
    )
    assert {**first, "out": ""} == {**second, "out": ""} and first["lr"] == 1e-5 and first["rotate"] is True
    assert set(first) == set(TrainConfig.__dataclass_fields__), "every option"
    other = main(["train", f"--config={written}", f"--out={tmp_path / 'third'}", "--seed=4"])
    assert other == 0 and not same(weights(tmp_path / "first", 4), weights(tmp_path / "third", 4))
    # alone it names the folder that the run is in, which is not written over
    capsys.readouterr()
    assert main(["train", f"--config={written}"]) == 2
    assert "holds a run; add --resume auto" in capsys.readouterr().err
    state = tmp_path / "first" / "checkpoints" / "step-00000004.pt"
    assert main(["train", f"--config={written}", f"--resume={state}", "--steps=5"]) == 0
    assert yaml.safe_load(written.read_text())["resume"] == "never", (
        "it is the uninterrupted run that it makes"
    )
    assert written.read_text().startswith("# the same run again: cips train --config")


def measured(folder, out, **changes):
    pytest.importorskip("torch_fidelity", reason="the metrics are part of the extra [metrics]")
    how = {
        "eval_every": 2,
        "eval_count": 6,
        "eval_metrics": "fid,is",
        "eval_extractor": "tiny_extractor:Tiny",
    }
    return train(config(folder, out, **{**how, **changes}), progress=False)


def test_a_run_measures_itself_and_is_the_same_run(folder, tmp_path):
    measured(folder, tmp_path / "run", steps=5)
    train(config(folder, tmp_path / "plain", steps=5), progress=False)
    assert same(weights(tmp_path / "run", 5), weights(tmp_path / "plain", 5))
    found = [line for line in lines(tmp_path / "run") if "d_loss" not in line]
    assert [line["step"] for line in found] == [2, 4, 5], "every second step and at the end"
    assert set(found[0]) == {"step", "eval/FD-Tiny", "eval/IS-Tiny", "eval/IS-Tiny_std"}
    files = sorted((tmp_path / "run" / "evaluations").iterdir())
    assert [path.name for path in files] == [f"step-0000000{k}.json" for k in (2, 4, 5)]
    result = json.loads(files[-1].read_text())
    assert result["values"]["FD-Tiny"] == pytest.approx(found[-1]["eval/FD-Tiny"], rel=1e-5)
    assert result["generated"]["step"] == 5 and result["data"]["count"] == 12
    # what was measured is the averaged generator that is kept
    flags = ["--extractor=tiny_extractor:Tiny", "--count=6", "--metrics=fid,is", "--device=cpu"]
    assert main(["eval", str(tmp_path / "run"), folder, f"--out={tmp_path / 'again.json'}", *flags]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["values"] == pytest.approx(result["values"], rel=1e-4)
    assert isinstance(load_generator(tmp_path / "run").w_mean, torch.Tensor)


def test_any_checkpoint_that_was_kept_can_be_measured(folder, tmp_path):
    """Its averaged generator: what the run measured at that step, when it was the newest."""
    measured(folder, tmp_path / "run")
    flags = ["--extractor=tiny_extractor:Tiny", "--count=6", "--metrics=fid,is", "--device=cpu"]
    for step in (2, 4):
        state = tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt"
        assert main(["eval", str(state), folder, *flags]) == 0
        beside = state.with_name(f"{state.stem}-{Path(folder).name}-Tiny.json")
        values = json.loads(beside.read_text())["values"]
        then = json.loads((tmp_path / "run" / "evaluations" / f"{state.stem}.json").read_text())["values"]
        assert values == pytest.approx(then, rel=1e-4)
    assert (
        values != json.loads((tmp_path / "run" / "evaluations" / "step-00000002.json").read_text())["values"]
    )


def test_a_run_killed_while_it_measures_does_so_when_it_goes_on(folder, tmp_path, monkeypatch):
    from cips.training.evaluate import TrainingEvaluation

    def killed(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingEvaluation, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            measured(folder, tmp_path / "run", checkpoint_every=0)
    assert not (tmp_path / "run" / "evaluations").exists()
    # the run's options say that it measures
    train(config(folder, tmp_path / "run", resume="auto", checkpoint_every=0), progress=False)
    measured(folder, tmp_path / "whole", checkpoint_every=0)
    drop = ("images_per_second", "memory_gib")
    kept = [
        [{k: v for k, v in line.items() if k not in drop} for line in lines(tmp_path / run)]
        for run in ("run", "whole")
    ]
    assert kept[0] == kept[1] and sum("eval/FD-Tiny" in line for line in kept[0]) == 2


def test_the_processes_of_a_run_measure_together(folder, tmp_path):
    """Two of them, each its share; the values are those that one process finds for the generator that was kept."""
    pytest.importorskip("torch_fidelity", reason="the metrics are part of the extra [metrics]")
    options = {**TINY, "data": folder, "out": tmp_path / "run", "eval_every": 2, "eval_count": 40}
    options |= {
        "eval_metrics": "fid,is",
        "eval_extractor": "tiny_extractor:Tiny",
        "cache": tmp_path / "cache",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = tmp_path / "log"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "cips",
        "train",
    ]
    done = subprocess.run(
        [*launcher, *flags],
        env={**os.environ, "PYTHONPATH": paths, "TINY_EXTRACTOR_LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in log.read_text().splitlines()]
    shares = [sum(int(count) for rank, count in seen if rank == k) for k in "01"]
    # real: one batch of 12, by both; then twice batches of 16, 16 and 8, of which the last round's is made by both
    assert shares == [12 + 2 * (16 + 8), 12 + 2 * (16 + 16)]
    result = json.loads((tmp_path / "run" / "evaluations" / "step-00000004.json").read_text())
    how = ["--extractor=tiny_extractor:Tiny", "--count=40", "--metrics=fid,is", "--device=cpu"]
    assert main(["eval", str(tmp_path / "run"), folder, f"--out={tmp_path / 'alone.json'}", *how]) == 0
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert result["values"] == pytest.approx(alone["values"], rel=1e-4)
    assert [line["step"] for line in lines(tmp_path / "run") if "eval/FD-Tiny" in line] == [2, 4]


def test_a_run_that_is_told_to_stop_measures_when_it_goes_on(folder, tmp_path, monkeypatch):
    step = TrainingState.train_step

    def interrupted(self, real):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, real)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "train_step", interrupted)
        assert measured(folder, tmp_path / "run").stopped_by == signal.SIGTERM
    assert load_training(tmp_path / "run" / "checkpoints" / "step-00000002.pt")["step"] == 2
    assert not (tmp_path / "run" / "evaluations").exists()
    train(config(folder, tmp_path / "run", resume="auto"), progress=False)
    assert [line["step"] for line in lines(tmp_path / "run") if "eval/FD-Tiny" in line] == [2, 4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_every": -1}, "eval_every: expected an integer of at least 0, got -1"),
        ({"eval_count": 0}, "eval_count: expected an integer of at least 1"),
        ({"eval_metrics": "fid,ppl"}, "metrics: expected some of fid,kid,precision,recall,is, got 'ppl'"),
    ],
)
def test_options_that_cannot_be_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**changes)


def test_what_cannot_be_measured_stops_a_run_before_it_begins(folder, tmp_path):
    with pytest.raises(UsageError, match="weights: none.pth: no such file"):
        measured(folder, tmp_path / "run", eval_weights="none.pth", eval_extractor="inception")
    with pytest.raises(UsageError, match="metrics: fid needs at least 2 generated images"):
        measured(folder, tmp_path / "run", eval_count=1)
    assert not (tmp_path / "run").exists()
