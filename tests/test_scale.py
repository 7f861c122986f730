"""Several processes: the gradients, batches and files of one, agreement on errors and signals, and being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cips import UsageError
from cips.checkpoint import load_training, training_files
from cips.data import Batches, Preparation, StoredImages, decoded_images, open_container
from cips.training import TrainConfig, train, trainer
from cips.training.state import TrainingState
from cips.training.world import World, take_device

TINY = {"size": 8, "width": 8, "n_layers": 3, "d_width": 1 / 512, "samples": 3, "device": "cpu", "log_every": 1}
BATCH, STYLE = 16, 128


def pictures(path: Path, count: int = 12, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    path.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f"{k:02d}.png")
    return path


def whole_batch() -> tuple[Tensor, Tensor]:
    """Images and latents of a step, the same in every process."""
    random = torch.Generator().manual_seed(7)
    images = torch.rand(BATCH, 3, 8, 8, generator=random, dtype=torch.float64) * 2 - 1
    return images, torch.randn(BATCH, STYLE, generator=random, dtype=torch.float64)


def prepared_state(world: World | None, accumulate: int = 1) -> TrainingState:
    """In float64, without noise, and with the latents that belong to this process's images."""
    torch.manual_seed(3)
    options = {**TINY, "batch": BATCH, "accumulate": accumulate, "r1": 3.0, "r1_every": 2, "ema_decay": 0.9}
    state = TrainingState(TrainConfig(**options).resolve(), world)
    for module in (state.generator, state.discriminator, state.average.module):
        module.double()
    forward = state.generator.forward
    state.generator.forward = lambda z, *points, **how: forward(z, *points, **{**how, "noise": "off"})
    mine = whole_batch()[1][state.world.rank :: state.world.size]
    calls = iter(range(10**6))

    def latents(count: int) -> Tensor:
        k = next(calls) % accumulate
        part = mine[k::accumulate]
        assert len(part) == count
        return part

    state.latents = latents
    return state


def recorded_gradients(state: TrainingState) -> list[list[Tensor | None]]:
    """Of the discriminator, of R1 and of the generator, all at the weights as they are."""
    found: list[list[Tensor | None]] = []
    for optimizer in (state.d_optimizer, state.g_optimizer):
        parameters = optimizer.param_groups[0]["params"]

        def step(parameters=parameters) -> None:
            found.append([None if p.grad is None else p.grad.clone() for p in parameters])

        optimizer.step = step
    state.train_step(whole_batch()[0][state.world.rank :: state.world.size])
    return found


def gradients_by_hand(state: TrainingState) -> list[list[Tensor | None]]:
    """The same of the whole batch in one piece, from the losses' formulas."""
    real, z = whole_batch()
    d, g = list(state.discriminator.parameters()), list(state.generator.parameters())
    logits = state.discriminator(state.generator(z).detach()), state.discriminator(real)
    d_loss = F.softplus(logits[0]).mean() + F.softplus(-logits[1]).mean()
    x = real.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(state.discriminator(x).sum(), x, create_graph=True)
    r1 = 3.0 / 2 * 2 * slope.square().sum() / BATCH
    g_loss = F.softplus(-state.discriminator(state.generator(z))).mean()
    # R1 of a bias is zero and not nothing, as in the official code
    return [
        list(torch.autograd.grad(loss, parameters, materialize_grads=True))
        for loss, parameters in ((d_loss, d), (r1, d), (g_loss, g))
    ]


def caught(function) -> tuple[str, str, bool]:
    """Kind, text and `quiet` of what a call raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "quiet", False)
    return "nothing", "", False


def work(rank: int, size: int, folder: str) -> None:
    """What each of the spawned processes does; its findings go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world, here, found = World.join("cpu"), Path(folder), {}
    assert (world.rank, world.size, world.backend) == (rank, size, "gloo")

    found["other device"] = caught(lambda: World.join(("cpu", "cuda")[rank]))
    found["gradients"] = {n: recorded_gradients(prepared_state(world, n)) for n in (1, 2)}
    state = prepared_state(world)
    if rank:  # other weights at first
        with torch.no_grad():
            state.generator.w_mean.add_(1.0)
            for p in (*state.generator.parameters(), *state.discriminator.parameters()):
                p.add_(1.0)
    state.replicate()
    for _ in range(3):
        state.train_step(whole_batch()[0][rank::size])
    found["trained"] = [state.generator.state_dict(), state.discriminator.state_dict(), state.average.module.state_dict()]

    many = [torch.full((3, 2), rank + 1.0), torch.arange(5) + rank, torch.full((600, 500), rank + 0.5).t()]
    many.append(torch.full((2, 3, 4, 5), 1.0 + rank).to(memory_format=torch.channels_last))
    world.sum_(many)
    found["sums"] = many
    found["largest"], found["gathered"] = world.largest(3 - rank), world.gather(("a", rank))
    found["share"], found["first"] = list(world.share(5)), world.first(lambda: rank + 10)

    def fails(where: int, error: Exception):
        def function() -> None:
            if rank == where:
                raise error

        return function

    found["first fails"] = caught(lambda: world.first(fails(0, UsageError("disk: full"))))
    found["first breaks"] = caught(lambda: world.first(fails(0, KeyError("x"))))
    found["one fails"] = caught(lambda: world.together(fails(1, UsageError("disk: full"))))

    os.chdir(here / f"machine{rank}")  # "shared" is the same pictures in both, "own" is not
    config = {**TINY, "batch": 8, "steps": 3, "sample_every": 0, "cache": "off"}

    def run(**changes):
        return lambda: train(TrainConfig(**{**config, **changes}), progress=False)

    found["other data"] = caught(run(data="own", out=str(here / "no1")))
    found["fewer images"] = caught(run(data="fewer", out=str(here / "no2")))
    found["no data"] = caught(run(data="first", out=str(here / "no3")))
    found["other option"] = caught(run(data="shared", out=str(here / "no4"), r1=1.0 + rank))
    found["batch"] = caught(run(data="shared", out=str(here / "no5"), batch=6, accumulate=2))
    found["fine"] = caught(run(data="shared", out=str(here / "run"), workers=1 + rank))
    found["held"] = caught(run(data="shared", out=str(here / "run"), resume="auto", batch=4))
    whole = TrainingState.train_step

    def diverging(self, real):
        values = whole(self, real)
        if rank == 1 and self.step == 2:
            values["g_loss"] = values["g_loss"] * float("nan")
        return values

    TrainingState.train_step = diverging
    found["diverged"] = caught(run(data="shared", out=str(here / "nan"), checkpoint_every=1))

    def interrupted(self, real):
        if rank == 1 and self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, real)

    TrainingState.train_step = interrupted
    result = run(data="shared", out=str(here / "stopped"), steps=50)()
    found["stopped"] = (result.step, result.stopped_by, result.rank)
    TrainingState.train_step = whole
    saving = trainer.checkpoint.save_training

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    trainer.checkpoint.save_training = full
    found["full"] = caught(run(data="shared", out=str(here / "full")))
    trainer.checkpoint.save_training = saving
    torch.save(found, here / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The folder, and what each of two processes has found."""
    folder, began = tmp_path_factory.mktemp("processes"), time.monotonic()
    for rank in range(2):
        machine = folder / f"machine{rank}"
        pictures(machine / "shared")
        pictures(machine / "own", seed=rank)
        pictures(machine / "fewer", count=12 - rank)
    pictures(folder / "machine0" / "first")
    processes = mp.spawn(work, (2, str(folder)), nprocs=2, join=False)
    try:
        while not processes.join(timeout=30):
            assert time.monotonic() - began < 900, "the processes wait for each other"
    finally:
        for process in processes.processes:
            process.kill()
    return folder, [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same_gradients(found, expected) -> None:
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            if a is None or b is None:  # no gradient, or one of zero
                assert all(each is None or not each.any() for each in (a, b))
            else:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_processes_at_half_the_batch_have_the_gradients_of_one(findings):
    expected = gradients_by_hand(prepared_state(None))
    assert not expected[1][-1].any(), "R1 does not reach the last bias"
    assert all(grad.abs().max() > 0 for grad in expected[2][:3])
    for found in findings[1]:
        assert_same_gradients(found["gradients"][1], expected)


def test_parts_of_a_batch_have_the_gradients_of_the_whole(findings):
    expected = gradients_by_hand(prepared_state(None))
    for parts in (2, 4):
        assert_same_gradients(recorded_gradients(prepared_state(None, parts)), expected)
    for found in findings[1]:
        assert_same_gradients(found["gradients"][2], expected)


def test_processes_stay_equal_bit_for_bit_and_train_as_one(findings):
    state = prepared_state(None)
    for _ in range(3):
        state.train_step(whole_batch()[0])
    alone = [state.generator.state_dict(), state.discriminator.state_dict(), state.average.module.state_dict()]
    for first, second, single in zip(*(found["trained"] for found in findings[1]), alone):
        assert first.keys() == second.keys() == single.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], single[key], rtol=1e-6, atol=1e-9, msg=key)


def test_what_processes_tell_each_other(findings):
    for rank, found in enumerate(findings[1]):
        a, b, c, d = found["sums"]
        assert torch.equal(a, torch.full((3, 2), 3.0)) and torch.equal(b, 2 * torch.arange(5) + 1)
        assert torch.equal(c, torch.full((500, 600), 2.0)) and torch.equal(d, torch.full((2, 3, 4, 5), 3.0))
        assert found["largest"] == 3 and found["gathered"] == [("a", 0), ("a", 1)]
        assert found["share"] == [[0, 2, 4], [1, 3]][rank] and found["first"] == 10
        assert found["first fails"] == ("UsageError", "disk: full", rank == 1)
        assert found["one fails"] == [
            ("UsageError", "process 1: disk: full", True),
            ("UsageError", "disk: full", False),
        ][rank]
    assert findings[1][1]["first breaks"][:2] == ("RuntimeError", "another process failed: KeyError: 'x'")


def test_differences_between_processes_are_refused_before_the_first_step(findings):
    folder, both = findings
    for rank, found in enumerate(both):
        quiet = rank == 1
        said = "option device: process 1 has 'cuda', process 0 has 'cpu'; expected the same on all processes"
        assert found["other device"] == ("UsageError", said, quiet)
        kind, text, said = found["other data"]
        assert (kind, said) == ("UsageError", quiet) and "data pixels: process 1 has " in text
        kind, text, said = found["fewer images"]
        assert (kind, said) == ("UsageError", quiet)
        assert "data images: process 1 has '11', process 0 has '12'; expected the same" in text
        kind, text, said = found["no data"]
        assert kind == "UsageError" and "first" in text and said == (rank == 0), "the one without it speaks"
        assert found["other option"] == (
            "UsageError",
            "option r1: process 1 has 2.0, process 0 has 1.0; expected the same on all processes",
            quiet,
        )
        assert "batch: expected a multiple of 4 (2 processes x 2 parts each), got 6" in found["batch"][1]
        assert "batch was 8, now 4" in found["held"][1]
    assert not list(folder.glob("no*")), "nothing is written for a run that cannot begin"


def test_one_process_writes_for_all(findings):
    folder, both = findings
    assert [found["fine"][0] for found in both] == ["nothing", "nothing"]
    names = sorted(p.relative_to(folder / "run").as_posix() for p in (folder / "run").rglob("*") if p.is_file())
    assert [name for name in names if not name.startswith("tensorboard")] == [
        "checkpoints/step-00000003.pt",
        "config.yaml",
        "generator.safetensors",
        "metrics.jsonl",
        "samples/fake-00000000.png",
        "samples/fake-00000003.png",
        "samples/real.png",
    ]
    assert sum(name.startswith("tensorboard") for name in names) <= 1
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    states = load_training(folder / "run" / "checkpoints" / "step-00000003.pt")["rng"]
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_what_stops_one_stops_all_at_the_same_step(findings):
    folder, both = findings
    for rank, found in enumerate(both):
        kind, text, quiet = found["diverged"]
        assert (kind, quiet) == ("DivergenceError", rank == 1)
        assert text.startswith("stopped at step 2: g_loss is nan; the last good state is ")
        assert text.endswith("step-00000001.pt")
        assert found["stopped"] == (2, signal.SIGTERM, rank)
        kind, text, quiet = found["full"]
        assert (kind, quiet) == ("UsageError", rank == 1)
        assert text.startswith("stopped at step 3: ") and "No space left" in text
        assert text.endswith("no checkpoint had been written")
    assert [p.name for p in training_files(folder / "stopped" / "checkpoints")] == ["step-00000002.pt"]


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_the_shares_of_a_batch_make_up_the_batch(tmp_path, crop):
    """Cuts, mirrors and turns included, in every epoch another order, and every image once an epoch."""
    random = np.random.default_rng(0)
    for k in range(12):
        shape = (10 + k % 3, 12, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{k:02d}.png")
    with open_container(str(tmp_path), 8) as container:
        source = StoredImages(decoded_images(container, Preparation(8, crop), cache="off"), 8, "set")
    whole = Batches(source, 6, seed=5, rotate=True)
    parts = [Batches(source, 6, seed=5, rotate=True, part=slice(r, None, 3)) for r in range(3)]
    for step in range(5):
        batch = whole(step)
        for rank, part in enumerate(parts):
            assert torch.equal(part(step), batch[rank::3])
    epochs = [np.concatenate([whole.indices(2 * n), whole.indices(2 * n + 1)]) for n in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_process_0_draws_as_a_single_one_and_the_others_draw_otherwise():
    draws = []
    for rank, step in ((0, 0), (1, 0), (2, 0), (1, 7)):
        state = prepared_state(None)
        state.world.rank = rank
        state.seed_random(11, step)
        draws.append(torch.randn(4).tolist())
    assert draws[0] == torch.randn(4, generator=torch.Generator().manual_seed(11)).tolist()
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_several_processes_cannot_have(monkeypatch, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=rf"device: expected auto, cuda or cpu for 2 processes .* got '{device}'"):
        take_device(device)
    take_device("cpu")


def test_fewer_gpus_than_processes(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="device: process 1 of this machine finds 1 GPUs; expected one each"):
        take_device("auto")


def start(data: Path, out: Path, *options: str) -> subprocess.Popen:
    flags = {**TINY, "batch": 8, "data": data, "out": out, "checkpoint_every": 1, "sample_every": 0, "r1_every": 3}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cips"]
    flags = [f"--{key}={value}" for key, value in flags.items()]
    return subprocess.Popen([*command, "train", *flags, *options], stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    began = time.monotonic()
    while not any(int(path.stem[5:]) >= step for path in training_files(out / "checkpoints")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < 300, "no checkpoint in time"
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in Linux's /proc")
def test_killed_and_stopped_two_processes_go_on_as_if_nothing_had_happened(tmp_path):
    data, out, random = pictures(tmp_path / "pictures"), tmp_path / "run", np.random.default_rng()
    process = start(data, out, "--resume=auto", "--steps=100000")
    wait_for_step(process, out, 2)
    time.sleep(random.uniform(0, 0.5))
    os.kill(random.choice(children(process)), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    done = int(training_files(out / "checkpoints")[0].stem[5:])
    process = start(data, out, "--resume=auto", "--steps=100000")
    wait_for_step(process, out, done + 2)
    process.terminate()  # torchrun passes it on
    _, messages = process.communicate(timeout=120)
    done = int(training_files(out / "checkpoints")[0].stem[5:])
    assert f"stopped by SIGTERM at step {done}, saved" in messages
    for folder in (out, tmp_path / "whole"):
        process = start(data, folder, "--resume=auto", f"--steps={done + 2}")
        _, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
    kept = [folder / "checkpoints" / f"step-{done + 2:08d}.pt" for folder in (out, tmp_path / "whole")]
    first, second = (load_training(path) for path in kept)
    for name in ("generator", "discriminator", "average"):
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), f"{name}: {key}"
    for mine, theirs in zip(first["rng"], second["rng"]):
        assert torch.equal(mine["cpu"], theirs["cpu"])
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (out, tmp_path / "whole")]
    for log in logs:
        for line in log:
            line.pop("images_per_second")
            line.pop("memory_gib")
    assert logs[0] == logs[1]
