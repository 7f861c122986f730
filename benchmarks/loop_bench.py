"""`cips train` as it runs, beside its bare iteration: images a second, memory, and seconds from the start to the first step.

    python benchmarks/loop_bench.py                 # on a GPU: 256x256, 16 images, the paper's generator
    python benchmarks/loop_bench.py --data PATH     # your images, in place of random ones
    python benchmarks/loop_bench.py --device cpu --preset small --size 16 --batch 4 --d-width 0.05 --windows 1

`bare` is the training step alone, in CUDA graphs where there are some, over and over on one batch that lies on the device: both
descents, R1 every 16 steps, the average. `loop` is the command with everything that it does beside: batches of the data from
a warm cache, signals, the log, and the pictures at the start; its rates are those of metrics.jsonl. Both take turns,
`--rounds` times, each time in a process of its own. A rate is the median of all windows of 48 steps after the first two; memory
is the peak of tensors on the device (of the process on a CPU). `start` runs from the call of the command to the
line of its first step in metrics.jsonl, the pictures at the start included.

The file is benchmarks/results/loop/<device>.json, or `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import machine  # noqa: E402
from cips.data import Batches, open_source  # noqa: E402
from cips.errors import UsageError  # noqa: E402
from cips.training import TrainConfig  # noqa: E402
from cips.training.graphs import GraphedSteps  # noqa: E402
from cips.training.progress import peak_memory  # noqa: E402
from cips.training.state import TrainingState  # noqa: E402
from data_bench import write_images  # noqa: E402

R1_EVERY = 16
WINDOW = 3 * R1_EVERY  # steps: as often with a penalty as without
SKIPPED = 2  # windows: both kinds of step are captured, and the clocks have settled
OPTIONS = ("data", "size", "batch", "preset", "device", "d_width", "cache")
CIPS = [sys.executable, "-m", "cips"]


def bare(config: TrainConfig, windows: int) -> dict:
    """Images a second of each window of steps on one batch, and the peak of memory in GiB."""
    how = {"cache": config.cache, "crop": config.crop}
    source = open_source(config.data, config.image_size, **how).to(config.device)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    batch = Batches(source, config.batch)(0)
    state = TrainingState(config)
    on_gpu = state.device.type == "cuda"
    step = GraphedSteps(state) if on_gpu else state.train_step
    rates = []
    for _ in range(SKIPPED + windows):
        began = time.perf_counter()
        for _ in range(WINDOW):
            step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        rates.append(WINDOW * config.batch / (time.perf_counter() - began))
    return {"images_per_second": rates[SKIPPED:], "memory_gib": peak_memory(state.device)}


def as_options(config: TrainConfig) -> list[str]:
    """Of the command line."""
    return [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in OPTIONS]


def train(config: TrainConfig, out: Path, steps: int, *options: str) -> float:
    """Runs the command; seconds from its call to the first line of its log."""
    log = out / "metrics.jsonl"
    command = [*CIPS, "train", *as_options(config), f"--out={out}", f"--steps={steps}", f"--r1-every={R1_EVERY}", *options]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    began, first = time.perf_counter(), 0.0
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    while run.poll() is None:
        if not first and log.exists() and log.stat().st_size:
            first = time.perf_counter() - began
        time.sleep(0.02)
    if run.returncode:
        raise SystemExit(f"loop_bench: cips train left with status {run.returncode}")
    return first or time.perf_counter() - began


def looped(config: TrainConfig, windows: int, out: Path) -> dict:
    """As `bare`, by the command's own log."""
    quiet = ("--sample-every=0", "--checkpoint-every=0", f"--log-every={WINDOW}")
    train(config, out, (SKIPPED + windows) * WINDOW, *quiet)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "images_per_second": [line["images_per_second"] for line in lines[SKIPPED:]],
        "memory_gib": lines[-1]["memory_gib"],
    }


def summary(found: dict[str, list[dict]], starts: list[float], head: dict) -> dict:
    """The results: medians over all windows of all rounds."""
    rows = {
        name: {
            "images_per_second": statistics.median(rate for each in parts for rate in each["images_per_second"]),
            "memory_gib": max(each["memory_gib"] for each in parts),
            "windows": sum(len(each["images_per_second"]) for each in parts),
        }
        for name, parts in found.items()
    }
    ratios = {key: rows["loop"][key] / rows["bare"][key] for key in ("images_per_second", "memory_gib")}
    return {**head, "rows": rows, "loop_to_bare": ratios, "start_seconds": min(starts)}


def table(results: dict) -> str:
    """Markdown."""
    lines = [
        f"{results['device']}, torch {results['torch']}; '{results['preset']}', {results['size']} px, {results['dtype']},"
        f" {results['batch']} images a step\n",
        "| | images/s | memory, GiB |",
        "|---|---|---|",
    ]
    for name, row in results["rows"].items():
        lines.append(f"| {name} | {row['images_per_second']:.1f} | {row['memory_gib']:.2f} |")
    ratios = results["loop_to_bare"]
    lines.append(f"| loop to bare | {ratios['images_per_second']:.3f} | {ratios['memory_gib']:.3f} |")
    lines.append(f"\nfirst step {results['start_seconds']:.1f} s after the call, with a warm cache")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", help="what to train on instead of random images")
    found.add_argument("--images", type=int, default=400, help="random images to write")
    found.add_argument("--size", type=int, default=256, help="pixels a side")
    found.add_argument("--batch", type=int, default=16, help="images a step")
    found.add_argument("--preset", default="paper", help="of the generator")
    found.add_argument("--d-width", type=float, default=1.0, help="multiplier on the discriminator's channels")
    found.add_argument("--device", default="auto", help="cpu: to try it out")
    found.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} steps, each time")
    found.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    found.add_argument("--out", type=Path, help="the file to write (default: in benchmarks/results/loop)")
    found.add_argument("--part", help=argparse.SUPPRESS)
    found.add_argument("--cache", help=argparse.SUPPRESS)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="cips-loop-bench-") as scratch:
            folder = Path(scratch)
            if options.data is None:
                options.data = str(folder / "images")
                write_images(folder / "images", options.images, options.size)
            options.cache = options.cache or str(folder / "cache")
            chosen = {name: getattr(options, name) for name in OPTIONS}
            config = TrainConfig(**chosen, r1_every=R1_EVERY).resolve()
            if options.part:
                Path(options.part).write_text(json.dumps(bare(config, options.windows)))
                return 0
            found: dict[str, list[dict]] = {"bare": [], "loop": []}
            starts = []
            for turn in range(options.rounds):
                print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
                part = folder / f"bare{turn}.json"
                again = [sys.executable, __file__, *as_options(config), f"--windows={options.windows}", f"--part={part}"]
                if subprocess.run(again).returncode:
                    raise SystemExit("loop_bench: the bare iteration failed")
                found["bare"].append(json.loads(part.read_text()))
                found["loop"].append(looped(config, options.windows, folder / f"loop{turn}"))
                starts.append(train(config, folder / f"start{turn}", 1, "--log-every=1"))
    except UsageError as error:
        print(f"loop_bench: error: {error}", file=sys.stderr)
        return 2
    head = {**machine.describe(torch.device(config.device)), "dtype": config.dtype, "preset": config.preset}
    results = summary(found, starts, {**head, "size": config.size, "batch": config.batch})
    path = machine.write(results, "loop", options.out)
    print(f"{table(results)}\n\n{path} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
