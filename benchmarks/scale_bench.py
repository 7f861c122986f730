"""Images a second of whole training steps, data included, on one GPU and on several of one host, in one run.

    python benchmarks/scale_bench.py                       # one and two GPUs, 16 images of 256 px each, bfloat16
    python benchmarks/scale_bench.py --gpus 1 2 4 8 --rounds 3
    python benchmarks/scale_bench.py --device cpu --gpus 1 2 --size 16 --preset small --batch 4    # tries it out, gloo

Every count of GPUs has `--batch` images a GPU, trained as `cips train` does: batches of the built-in pictures (random ones
where the package is missing), both descents, R1 every 16 steps, sums of gradients, the average; once in CUDA graphs and
once without. The counts take turns, `--rounds` times, each time in processes of their own that torchrun starts. A window
is the 16 steps from one R1 to the next; a row is the median of all windows of all rounds. A row counts only where all
processes hold the same weights at the end, bit for bit, and these are finite: otherwise the exit status is 1.

`sum_ms` is the time of adding up one step's gradients (both networks) alone, which the step does not hide. The file is
benchmarks/results/scale/<device>.json, or `--out`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import machine  # noqa: E402
from cips.data import Batches, Decoded, EarthCrops, ImageSource, StoredImages, earth  # noqa: E402
from cips.errors import UsageError  # noqa: E402
from cips.training import TrainConfig  # noqa: E402
from cips.training.graphs import GraphedSteps  # noqa: E402
from cips.training.state import TrainingState  # noqa: E402
from cips.training.world import World, take_device  # noqa: E402

R1_EVERY = 16
WARM = 3 * R1_EVERY  # both kinds of step are captured by then
RANDOM_IMAGES = 256


def source_of(size: int) -> ImageSource:
    """The built-in pictures, or random ones of the same size."""
    if earth.available():
        return EarthCrops(size)
    pixels = np.random.default_rng(0).integers(0, 256, (RANDOM_IMAGES * size * size, 3), dtype=np.uint8)
    names, shapes = [f"{k}" for k in range(RANDOM_IMAGES)], np.full((RANDOM_IMAGES, 2), size)
    return StoredImages(Decoded(names, shapes, pixels, []), size, "random")


def wait(device: torch.device) -> None:
    """For everything that the device has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of_windows(state: TrainingState, batches: Batches, graphed: bool, windows: int) -> list[float]:
    """Seconds of each window of `R1_EVERY` steps, after a warm-up."""
    step = GraphedSteps(state) if graphed else state.train_step
    for _ in range(WARM if graphed else R1_EVERY + 2):
        step(batches(state.step))
    taken = []
    for _ in range(windows):
        wait(state.device)
        state.world.largest(0)  # all begin together
        began = time.perf_counter()
        for _ in range(R1_EVERY):
            step(batches(state.step))
        wait(state.device)
        taken.append(time.perf_counter() - began)
    return taken


def milliseconds_of_sums(state: TrainingState, repeats: int = 10) -> float:
    """Of adding up gradients of one step of either network, best of `repeats`."""
    tensors = [torch.zeros_like(p) for m in (state.generator, state.discriminator) for p in m.parameters()]
    taken = []
    for _ in range(repeats):
        wait(state.device)
        state.world.largest(0)
        began = time.perf_counter()
        state.world.sum_(tensors)
        wait(state.device)
        taken.append(time.perf_counter() - began)
    return min(taken) * 1e3


def digest(state: TrainingState) -> str:
    """Of all weights and buffers."""
    whole = hashlib.sha256()
    for module in (state.generator, state.discriminator):
        for value in module.state_dict().values():
            whole.update(value.contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()


def work(options: argparse.Namespace) -> None:
    """One process of one count of GPUs; process 0 writes what was measured."""
    take_device(options.device)
    config = TrainConfig(
        size=options.size,
        preset=options.preset,
        device=options.device,
        d_width=options.d_width,
        r1_every=R1_EVERY,
    ).resolve()
    world = World.join(config.device)
    batches = Batches(
        source_of(options.size).to(config.device),
        options.batch * world.size,
        part=slice(world.rank, None, world.size),
    )
    torch.backends.cudnn.benchmark = True
    rows = []
    for graphed in (False, True) if config.device == "cuda" else (False,):
        torch.manual_seed(0)
        state = TrainingState(config, world)
        state.replicate()
        state.seed_random(0)
        if config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = seconds_of_windows(state, batches, graphed, options.windows)
        same = len(set(world.gather(digest(state)))) == 1
        images = options.batch * world.size * R1_EVERY
        rows.append(
            {
                "gpus": world.size,
                "graphs": graphed,
                "images_per_second": [images / seconds for seconds in taken],
                "sum_ms": milliseconds_of_sums(state) if world.size > 1 else 0.0,
                "peak_bytes": torch.cuda.max_memory_allocated() if config.device == "cuda" else None,
                "ok": same and state.all_finite(),
            }
        )
        del state
        gc.collect()  # graphs that hold recorded sums must go before the process group does
    if world.rank == 0:
        head = {
            **machine.describe(torch.device(config.device)),
            "dtype": config.dtype,
            "preset": config.preset,
        }
        Path(options.part).write_text(json.dumps({"head": head, "rows": rows}))
    world.close()


def launch(options: argparse.Namespace, count: int, part: Path) -> None:
    """Runs `work` in `count` processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        __file__,
    ]
    for name in ("batch", "size", "preset", "device", "windows", "d_width"):
        command.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    done = subprocess.run([*command, f"--part={part}"])
    if done.returncode or not part.exists():
        raise SystemExit(f"scale_bench: {count} processes: left with status {done.returncode}")


def merged(parts: list[dict], options: argparse.Namespace) -> dict:
    """The results file: medians over all windows, and each row against the smallest count's of its kind."""
    rows = []
    for graphed in (False, True):
        for count in options.gpus:
            found = [
                r for part in parts for r in part["rows"] if (r["gpus"], r["graphs"]) == (count, graphed)
            ]
            if not found:
                continue
            rates = [rate for row in found for rate in row["images_per_second"]]
            rows.append(
                {
                    "gpus": count,
                    "graphs": graphed,
                    "images_per_second": statistics.median(rates),
                    "p20": float(np.quantile(rates, 0.2)),
                    "p80": float(np.quantile(rates, 0.8)),
                    "windows": len(rates),
                    "sum_ms": min(row["sum_ms"] for row in found),
                    "peak_bytes": found[0]["peak_bytes"],
                    "ok": all(row["ok"] for row in found),
                }
            )
            first = next(row for row in rows if row["graphs"] == graphed)
            rows[-1]["speedup"] = rows[-1]["images_per_second"] / first["images_per_second"]
    chosen = {"batch": options.batch, "size": options.size, "r1_every": R1_EVERY, "rounds": options.rounds}
    return {**parts[0]["head"], **chosen, "rows": rows}


def table(results: dict) -> str:
    """Markdown."""
    lines = [
        f"{results['device']}, torch {results['torch']}; '{results['preset']}', {results['size']} px, {results['dtype']},"
        f" {results['batch']} images a GPU\n",
        "| GPUs | CUDA graphs | images/s (p20 - p80) | x the first | sums of gradients, ms | right |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        spread = f"{row['images_per_second']:.1f} ({row['p20']:.1f} - {row['p80']:.1f})"
        right = "yes" if row["ok"] else "NO"
        graphs = "yes" if row["graphs"] else "no"
        lines.append(
            f"| {row['gpus']} | {graphs} | {spread} | {row['speedup']:.2f} | {row['sum_ms']:.2f} | {right} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="counts to compare")
    found.add_argument("--batch", type=int, default=16, help="images a GPU")
    found.add_argument("--size", type=int, default=256, help="pixels a side")
    found.add_argument("--preset", default="paper", help="of the generator")
    found.add_argument(
        "--d-width", type=float, default=1.0, help="multiplier on the discriminator's channels"
    )
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try it out")
    found.add_argument("--windows", type=int, default=4, help=f"of {R1_EVERY} steps, each time")
    found.add_argument("--rounds", type=int, default=2, help="how often the counts take turns")
    found.add_argument("--out", type=Path, help="the file to write")
    found.add_argument("--part", help=argparse.SUPPRESS)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.part:
            work(options)
            return 0
        have = torch.cuda.device_count()
        if options.device == "cuda" and have < max(options.gpus):
            raise UsageError(f"gpus: {max(options.gpus)} asked for, {have} there; try --device cpu, or fewer")
    except UsageError as error:
        print(f"scale_bench: error: {error}", file=sys.stderr)
        return 2
    parts = []
    with tempfile.TemporaryDirectory(prefix="cips-scale-bench-") as scratch:
        for turn in range(options.rounds):
            for count in options.gpus:
                print(f"round {turn + 1} of {options.rounds}: {count} GPUs", file=sys.stderr, flush=True)
                part = Path(scratch) / f"{turn}-{count}.json"
                launch(options, count, part)
                parts.append(json.loads(part.read_text()))
    results = merged(parts, options)
    path = machine.write(results, "scale", options.out)
    print(f"{table(results)}\n\n{path} written")
    return 0 if all(row["ok"] for row in results["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
