"""Two GPUs of one host: eager steps, steps in CUDA graphs, and the command line, over NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from cips import UsageError
from cips.checkpoint import load_training, training_files
from cips.training import TrainConfig
from cips.training.graphs import GraphedSteps
from cips.training.state import TrainingState
from cips.training.world import World

OPTIONS = {"size": 16, "batch": 16, "width": 16, "n_layers": 3, "d_width": 1 / 512, "samples": 4, "r1_every": 2}
STEPS, BATCH = 12, 16

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def images() -> list[torch.Tensor]:
    """Whole batches, the same in every process."""
    random = torch.Generator().manual_seed(5)
    return [(torch.rand(BATCH, 3, 16, 16, generator=random) * 2 - 1) for _ in range(STEPS)]


def steps(world: World, graphed: bool) -> dict:
    """Twelve steps from the same weights and random numbers."""
    torch.manual_seed(0)
    state = TrainingState(TrainConfig(**OPTIONS, device="cuda", dtype="float32").resolve(), world)
    state.replicate()
    state.seed_random(1)
    step = GraphedSteps(state) if graphed else state.train_step
    share = slice(world.rank, None, world.size)
    metrics = [step(real[share].cuda()) for real in images()]
    modules = (state.generator, state.discriminator, state.average.module)
    return {
        "metrics": [{name: value.cpu() for name, value in each.items()} for each in metrics],
        "weights": [p.detach().cpu() for module in modules for p in (*module.parameters(), *module.buffers())],
        "graphs": len(step._graphs) if graphed else 0,
    }


def work(rank: int, size: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    torch.backends.cudnn.deterministic = True  # the same algorithms in both: twelve steps make much of a rounding
    dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World.join("cuda")
    found = {graphed: steps(world, graphed) for graphed in (False, True)}
    torch.save(found, Path(folder) / f"found{rank}.pt")
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.mark.gpu
@two_gpus
def test_two_gpus_step_alike_with_and_without_graphs(tmp_path):
    processes, began = mp.spawn(work, (2, str(tmp_path)), nprocs=2, join=False), time.monotonic()
    try:
        while not processes.join(timeout=30):
            assert time.monotonic() - began < 500, "the processes wait for each other"
    finally:
        for process in processes.processes:
            process.kill()
    both = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for graphed in (False, True):
        for first, second in zip(both[0][graphed]["weights"], both[1][graphed]["weights"]):
            assert torch.equal(first, second), "the processes hold the same weights, bit for bit"
    for found in both:
        assert found[True]["graphs"] == 2
        for eager, replayed in zip(found[False]["metrics"], found[True]["metrics"]):
            assert eager.keys() == replayed.keys()
            for name in eager:
                torch.testing.assert_close(replayed[name], eager[name], rtol=1e-3, atol=1e-3)
        for eager, replayed in zip(found[False]["weights"], found[True]["weights"]):
            torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_two_gpus_from_the_command_line(tmp_path, graphs):
    """Trains, goes on, and leaves without hanging."""
    data, random = tmp_path / "pictures", np.random.default_rng(0)
    data.mkdir()
    for k in range(24):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data / f"{k}.png")
    for until in (10, 14):
        options = {**OPTIONS, "data": data, "out": tmp_path / "run", "steps": until, "log_every": 1, "resume": "auto"}
        flags = [f"--{key}={value}" for key, value in {**options, "cuda_graphs": graphs}.items()]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cips"]
        done = subprocess.run([*command, "train", *flags], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    (newest, *_) = training_files(tmp_path / "run" / "checkpoints")
    states = load_training(newest)["rng"]
    assert len(states) == 2 and not torch.equal(states[0]["device"], states[1]["device"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert all(np.isfinite(list(line.values())).all() for line in lines)


def test_graphs_of_sums_through_gloo_are_refused():
    state = TrainingState(TrainConfig(**OPTIONS, device="cpu").resolve())
    state.world.backend = "gloo"
    with pytest.raises(UsageError, match="cuda_graphs: cannot record steps whose gradients travel through gloo"):
        GraphedSteps(state)
