"""What training a generator costs in memory and time by what it keeps: `save="all"`, "some", "none", and a path-length penalty.

    python benchmarks/memory_bench.py                                     # on a GPU: the paper's generator, bfloat16
    python benchmarks/memory_bench.py --device cpu --preset small --cases 16x2 --samples 3            # tries it out

A row is one forward and backward of whole images through the generator, from latents to every parameter's gradient; on a GPU as
a CUDA graph, the ways of a case taking turns of a third of a second. Memory is the most that is held beyond parameters, their gradients and the
latents. `penalty` is StyleGAN2's regulariser of the path length, the derivative of a gradient by w: second order runs by
the reference formulation, the image as a whole and launched one by one; it is measured for one image. A case is SIZExIMAGES; a
size that is not the table's reads it between its entries.

Targets: "none" at most 0.15 GB an image where there are several and 2.4 GB of one of 1024x1024, in at most 1.4 times the
time of "all"; a miss is printed, and the exit status is 1. The file is benchmarks/results/memory/<device>.json, or `--out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import machine  # noqa: E402
from cips import Generator, presets  # noqa: E402
from measure import Clock, captured, peak_bytes  # noqa: E402

SAVES = ("all", "some", "none")
PENALTY = "penalty"
# milliseconds of a turn: a card at its power limit gives a short call the clock that rest has left, and a longer one less
TURN = 300.0
TIMES = 1.4
SEVERAL, DENSE = 0.15e9, 2.4e9  # bytes: an image of several, one image


def step(generator: Generator, batch: int, penalty: bool) -> Callable[[], object]:
    """A call that makes the gradient of every parameter."""
    parameter = generator.w_mean
    random = torch.Generator().manual_seed(0)
    z = torch.randn(batch, generator.config.style_dim, generator=random).to(parameter.device)
    height, width = generator.config.size if isinstance(generator.config.size, tuple) else 2 * (generator.config.size,)
    sent = torch.randn(batch, 3, height, width, generator=random).to(parameter.device)
    parameters = [p for p in generator.parameters() if p.requires_grad]

    def plain() -> object:
        return torch.autograd.grad(generator(z), parameters, sent, allow_unused=True)

    def second() -> object:
        w = generator.mapping(z)
        images = generator(w, input_is_w=True)
        (slope,) = torch.autograd.grad((images * sent).sum(), w, create_graph=True)
        loss = (slope.norm(dim=-1) - 1.0).square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return second if penalty else plain


def measure(options: argparse.Namespace, size: int, batch: int, clock: Clock) -> list[dict]:
    """The rows of one case."""
    config = dataclasses.replace(presets[options.preset], size=size, table_size=options.table)
    device, rows, calls = torch.device(options.device), [], []
    for save in (*SAVES, *((PENALTY,) if batch == 1 and size <= options.table else ())):
        torch.manual_seed(0)
        kept = "all" if save == PENALTY else save
        generator = Generator(config, dtype=getattr(torch, options.dtype), save=kept).to(device)
        row = {"size": size, "batch": batch, "save": save, "peak_bytes": None, "ms": None, "reason": None}
        rows.append(row)
        call = step(generator, batch, save == PENALTY)
        try:
            call()  # kernels are compiled
            sizes = sum(p.nbytes for p in generator.parameters() if p.requires_grad)  # of the gradients
            row["peak_bytes"] = (peak_bytes(call, device) or 0) - sizes
            if device.type == "cuda" and save != PENALTY:
                torch.cuda.empty_cache()  # a graph has memory of its own
                call = captured([call]).call
            calls.append((row, call))
        except torch.OutOfMemoryError as error:
            row["reason"] = str(error).splitlines()[0]
        print(f"{size}x{size}, {batch} images, {save}", file=sys.stderr, flush=True)
    times: dict[int, list[float]] = {}
    repeats = [max(1, round(TURN / clock.time(call))) if clock.cuda else 1 for _, call in calls]
    for number in range(options.samples + 1):
        for index, (_, call) in enumerate(calls):
            ms = clock.time(call, repeats[index]) / repeats[index]
            if number:
                times.setdefault(index, []).append(ms)
    for index, (row, _) in enumerate(calls):
        row["ms"] = statistics.median(times[index])
    del calls, call
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def missed(rows: list[dict]) -> list[str]:
    """The targets that are not met, in words."""
    found = []
    for row in rows:
        whole = next(r for r in rows if (r["size"], r["batch"], r["save"]) == (row["size"], row["batch"], "all"))
        if row["save"] != "none" or row["ms"] is None:
            continue
        place = f"{row['size']}x{row['size']}, {row['batch']} images, none"
        if whole["ms"] is not None and row["ms"] > TIMES * whole["ms"]:
            found.append(f"{place}: {row['ms'] / whole['ms']:.2f} times the time of all, at most {TIMES}")
        limit = SEVERAL if row["batch"] > 1 else DENSE
        if row["peak_bytes"] / row["batch"] > limit:
            found.append(f"{place}: {row['peak_bytes'] / row['batch'] / 1e9:.2f} GB an image, at most {limit / 1e9}")
    return found


def table(results: dict) -> str:
    """Markdown."""
    lines = [
        f"{results['device']}, torch {results['torch']}; '{results['options']['preset']}', {results['options']['dtype']}\n",
        "| images | kept | GB | GB an image | ms | times all |",
        "|---|---|---|---|---|---|",
    ]
    rows = results["rows"]
    for row in rows:
        head = f"| {row['batch']} of {row['size']}x{row['size']} | {row['save']} "
        if row["ms"] is None:
            lines.append(f"{head}| {row['reason']} | | | |")
            continue
        whole = next(r["ms"] for r in rows if (r["size"], r["batch"], r["save"]) == (row["size"], row["batch"], "all"))
        ratio = "" if whole is None else f"{row['ms'] / whole:.2f}"
        peak = row["peak_bytes"] / 1e9
        lines.append(f"{head}| {peak:.2f} | {peak / row['batch']:.3f} | {row['ms']:.1f} | {ratio} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cases", nargs="+", default=["256x16", "256x1", "1024x1"], help="SIZExIMAGES")
    found.add_argument("--preset", default="paper", help="of the generator")
    found.add_argument("--table", type=int, default=256, help="points a side of its table of embeddings")
    found.add_argument("--samples", type=int, default=9, help="timed calls of each")
    found.add_argument("--device", default="cuda" if on_gpu else "cpu")
    found.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=("bfloat16", "float16", "float32"))
    found.add_argument("--out", type=Path, help="the file to write (default: in benchmarks/results/memory)")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 where a target is missed, 2 for a bad argument."""
    command = parser()
    options = command.parse_args(arguments)
    cases = []
    for case in options.cases:
        size, _, batch = case.partition("x")
        if not (size.isdigit() and batch.isdigit() and int(size) > 0 and int(batch) > 0):
            command.error(f"--cases: expected SIZExIMAGES such as 256x16, got {case!r}")
        cases.append((int(size), int(batch)))
    if options.samples < 1:
        command.error(f"--samples: expected at least 1, got {options.samples}")
    if options.preset not in presets:
        command.error(f"--preset: expected one of {', '.join(presets)}, got {options.preset!r}")
    clock = Clock(torch.device(options.device))
    rows = [row for case in cases for row in measure(options, *case, clock)]
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    results = {**machine.describe(torch.device(options.device)), "options": chosen, "rows": rows}
    path = machine.write(results, "memory", options.out)
    print(f"{table(results)}\n\n{path} written")
    misses = missed(rows)
    for miss in misses:
        print(f"missed: {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
