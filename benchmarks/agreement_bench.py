"""Whether a generator learns the same by the fused kernels as by the reference formulation: losses and Fréchet distance.

    python benchmarks/agreement_bench.py                    # 2,000 steps at 64 px, three seeds, cuda against reference
    python benchmarks/agreement_bench.py --device cpu --backends cpu reference --size 16 --steps 20 --batch 4 --count 32

Every backend and seed is a run of `cips train` on the built-in pictures with the same options, then of `cips eval`. A seed
fixes weights, latents, noise and the order of the data, so that two runs of one seed differ by rounding alone; what rounding
may do over thousands of steps is what seeds do. How far the two are apart, in the curve of each loss (its mean over every
tenth of a run) and in the Fréchet distance, is therefore compared with every other way to part all runs in two: where no
way sets them farther apart the backends differ, and the exit status is 1. Beside it, each mean by itself: whether the two
backends' are nearer than the seeds of either are apart, which one in some twenty is not by chance.

The file is benchmarks/results/agreement/<device>.json, or `--out`. `--runs FOLDER` keeps the runs, and goes on with what
an interrupted call left there; `--again FILE` compares the runs of a results file once more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import machine  # noqa: E402

PARTS = 10  # of a run: losses of each are averaged
LOSSES = ("d_loss", "g_loss")


def runs_of(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Every run, `options.jobs` at a time, dealt out to the GPUs in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(k) for k in range(torch.cuda.device_count()))
    gpus: queue.Queue[str | None] = queue.Queue()
    for k in range(options.jobs):
        gpus.put(visible.split(",")[k % len(visible.split(","))] if options.device == "cuda" else None)

    def run(pair: tuple[int, str]) -> dict:
        gpu = gpus.get()
        try:
            return run_of(options, folder, pair[1], pair[0], gpu)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(options.jobs) as pool:
        # seeds outside: what a time limit cuts off is a seed of both
        return list(pool.map(run, [(seed, backend) for seed in options.seeds for backend in options.backends]))


def run_of(options: argparse.Namespace, folder: Path, backend: str, seed: int, gpu: str | None = None) -> dict:
    """One training and its evaluation: losses by tenths, and the Fréchet distance."""
    run = folder / f"{backend}-{seed}"
    train = [
        "train", f"--data={options.data}", f"--out={run}", f"--backend={backend}", f"--seed={seed}", f"--size={options.size}",
        f"--steps={options.steps}", f"--batch={options.batch}", f"--preset={options.preset}", f"--d-width={options.d_width}",
        f"--device={options.device}", f"--log-every={max(1, options.steps // 200)}", "--sample-every=0", "--resume=auto",
    ]  # fmt: skip
    if options.width is not None:
        train.append(f"--width={options.width}")
    if options.layers is not None:
        train.append(f"--n-layers={options.layers}")
    _cips(train, gpu)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {"backend": backend, "seed": seed, **{name: tenths(lines, name, options.steps) for name in LOSSES}}
    if options.count:
        found = run / "fid.json"
        _cips(
            ["eval", str(run), options.data, "--metrics=fid", f"--count={options.count}", f"--extractor={options.extractor}",
             f"--device={options.device}", f"--out={found}"],
            gpu,
        )  # fmt: skip
        values = json.loads(found.read_text())["values"]
        name = next(name for name in values if name.startswith("F") and not name.endswith("_std"))
        result |= {"distance": values[name], "distance_name": name}
    return result


def _cips(arguments: Sequence[str], gpu: str | None) -> None:
    print("cips", *arguments, file=sys.stderr, flush=True)
    env = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run([sys.executable, "-m", "cips", *arguments], stdout=sys.stderr, env=env)
    if done.returncode:
        raise RuntimeError(f"agreement_bench: cips {arguments[0]} left with status {done.returncode}")


def tenths(lines: Sequence[dict], name: str, steps: int) -> list[float]:
    """Means of a logged value over each tenth of the run."""
    groups: list[list[float]] = [[] for _ in range(PARTS)]
    for line in lines:
        if name in line:
            groups[min(PARTS - 1, (line["step"] - 1) * PARTS // steps)].append(line[name])
    return [statistics.mean(group) for group in groups if group]


def part(runs: Sequence[dict], name: str, group: Sequence[int]) -> float:
    """How far the mean curve of the runs `group` is from that of the others, root of the mean square over its points."""
    curves = [run[name] if isinstance(run[name], list) else [run[name]] for run in runs]
    length = min(len(curve) for curve in curves)
    sides = [[c for k, c in enumerate(curves) if (k in group) == inside] for inside in (True, False)]
    means = [[statistics.mean(c[k] for c in side) for k in range(length)] for side in sides]
    return math.sqrt(statistics.mean((x - y) ** 2 for x, y in zip(*means)))


def partings(runs: Sequence[dict], backends: Sequence[str]) -> dict[str, dict]:
    """For each loss's curve and for the distance: how far the backends are apart, and which share of all ways to part the
    runs in two as large groups sets them at least as far apart. They agree unless theirs is the farthest."""
    own = tuple(k for k, run in enumerate(runs) if run["backend"] == backends[0])
    ways = [(0, *rest) for rest in itertools.combinations(range(1, len(runs)), len(runs) // 2 - 1)]  # each once
    found = {}
    for name in (*LOSSES, "distance"):
        if all(name in run for run in runs):
            apart, others = part(runs, name, own), [part(runs, name, way) for way in ways]
            as_far = sum(other >= apart * (1 - 1e-9) for other in others)
            farthest = as_far == 1 and len(ways) > 1
            found[name] = {"apart": apart, "farthest": max(others), "as_far": as_far, "ways": len(ways), "agree": not farthest}
    return found


def means(runs: Sequence[dict], backends: Sequence[str]) -> dict[str, dict]:
    """For each quantity and tenth the two means, how far seeds are apart, and whether the means are nearer than that."""
    quantities = {f"{name}, tenth {k + 1}": (name, k) for name in LOSSES for k in range(min(len(r[name]) for r in runs))}
    if all("distance" in run for run in runs):
        quantities["distance"] = ("distance", None)
    found = {}
    for title, (name, k) in quantities.items():
        values = {b: [r[name] if k is None else r[name][k] for r in runs if r["backend"] == b] for b in backends}
        means = {b: statistics.mean(v) for b, v in values.items()}
        spread = max(max(v) - min(v) for v in values.values())
        apart = abs(means[backends[0]] - means[backends[1]])
        found[title] = {"means": means, "apart": apart, "spread": spread, "nearer": apart <= spread}
    return found


def table(results: dict) -> str:
    """Markdown."""
    one, other = results["backends"]
    lines = [
        f"{results['device']}, torch {results['torch']}; '{results['preset']}', {results['size']} px, {results['steps']} steps of"
        f" {results['batch']}, {len(results['seeds'])} seeds\n",
        f"| | {one} and {other} are apart | the farthest parting | as far or farther | agree |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["comparison"].items():
        title = "Fréchet distance" if name == "distance" else f"{name}, the curve"
        agree = "yes" if row["agree"] else "NO"
        lines.append(f"| {title} | {row['apart']:.3g} | {row['farthest']:.3g} | {row['as_far']} of {row['ways']} | {agree} |")
    lines += [f"\n| mean | {one} | {other} | apart | seeds apart | nearer |", "|---|---|---|---|---|---|"]
    for title, row in results["means"].items():
        first, second = (row["means"][b] for b in (one, other))
        nearer = "yes" if row["nearer"] else "no"
        lines.append(f"| {title} | {first:.4g} | {second:.4g} | {row['apart']:.2g} | {row['spread']:.2g} | {nearer} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--backends", nargs=2, default=["cuda" if on_gpu else "cpu", "reference"], help="the two to compare")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each")
    found.add_argument("--data", default="earth", help="what cips train takes")
    found.add_argument("--steps", type=int, default=2000, help="of every run, at least 10")
    found.add_argument("--size", type=int, default=64, help="pixels a side")
    found.add_argument("--batch", type=int, default=8, help="images a step")
    found.add_argument("--preset", default="paper", help="of the generator")
    found.add_argument("--width", type=int, default=256, help="channels of its layers")
    found.add_argument("--layers", type=int, default=9, help="number of its layers")
    found.add_argument("--d-width", type=float, default=0.25, help="multiplier on the discriminator's channels")
    found.add_argument("--count", type=int, default=2000, help="images of the Fréchet distance; 0: leave it out")
    found.add_argument("--extractor", default="auto", help="of its features, see cips eval")
    found.add_argument("--device", default="cuda" if on_gpu else "cpu", help="of the runs")
    found.add_argument("--jobs", type=int, default=max(1, torch.cuda.device_count()), help="runs at a time, by default a GPU each")
    found.add_argument("--runs", type=Path, help="folder that keeps the runs")
    found.add_argument("--again", type=Path, metavar="FILE", help="results whose runs are compared once more; nothing is run")
    found.add_argument("--out", type=Path, help="the file to write")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    command = parser()
    options = command.parse_args(arguments)
    if options.steps < PARTS:
        command.error(f"--steps: expected at least {PARTS}, got {options.steps}")
    if options.jobs < 1:
        command.error(f"--jobs: expected at least 1, got {options.jobs}")
    if len(options.seeds) < 2:
        command.error(f"--seeds: expected at least two, whose runs are apart, got {len(options.seeds)}")
    if options.again is not None:
        results = json.loads(options.again.read_text())
        return finish(results, options.out or options.again)
    with ExitStack() as stack:
        scratch = options.runs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cips-agreement-")))
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            runs = runs_of(options, scratch)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
    chosen = {name: getattr(options, name) for name in ("backends", "seeds", "data", "steps", "size", "batch", "preset", "width", "layers")}
    results = {**machine.describe(torch.device(options.device)), **chosen, "runs": runs}
    return finish(results, options.out)


def finish(results: dict, out: Path | None) -> int:
    """Compares the runs, writes the file and prints what it holds; the exit status."""
    runs, backends = results["runs"], results["backends"]
    results = {**results, "comparison": partings(runs, backends), "means": means(runs, backends)}
    path = machine.write(results, "agreement", out)
    print(f"{table(results)}\n\n{path} written")
    return 0 if all(row["agree"] for row in results["comparison"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
