"""What pays in the Triton backend's inference: chunks that stay in L2, pairs of layers in one kernel, or the plain chain.

    python benchmarks/triton_fusion_bench.py --budget 120 --json triton_fusion.json

takes the benchmark's stack (15 layers, 7 ToRGBs, counter noise) in bfloat16 at 256x256, 512 and 256 channels wide, B = 1 and
16. Every variant is first compared: chunks with the chain, bit for bit; the chain and the pairs with the float64 oracle on
some of the pixels, by the rule of at most twice the eager error. Then all take turns with cuBLAS's 8192^3, and medians are
printed. What is not right is not timed. `cips_kernels.triton.fusion.DEFAULT` is the switch that the answer decides.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":  # before torch is imported, and only for a process of its own
    environment.prepare()

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch
from torch import Tensor

import machine
import progress
from cases import Case, Problem, make_case, make_problem
from ceilings import COPY, MATMUL, Ceilings
from cips_kernels import functional, reference
from cips_kernels.testing import EAGER_FACTOR, poisoned_empty, relative_error
from cips_kernels.triton.config import PairTile
from cips_kernels.triton.fusion import Fusion, using
from measure import Clock, Entry, captured, take_turns

_CHECKED = 2048  # pixels of each image that the oracle computes
CHAIN = Fusion()
# half and whole waves of an H100 (66 tiles of 128 pixels) beside powers of two
CHUNKS = (8192, 8448, 16384, 16896, 25344, 33792)
# each compiles for 9.0 without spills; the first is the rule's own
TILES = {
    512: (PairTile(64, 32, 8, 2, 2), PairTile(64, 64, 8, 1, 2), PairTile(64, 16, 8, 4, 2), PairTile(64, 32, 16, 2, 2)),
    256: (PairTile(128, 64, 8, 2, 2), PairTile(128, 32, 8, 3, 2), PairTile(128, 128, 8, 1, 2), PairTile(64, 64, 4, 1, 2)),
}


@dataclass
class Variant:
    """One way to run the stack, and what became of it: why it was not timed, or its entry."""

    name: str
    fusion: Fusion
    graph: bool
    fault: str | None = None
    error: float | None = None
    entry: Entry | None = field(default=None, repr=False)


def variants(case: Case, cuda: bool, chunks: Sequence[int]) -> list[Variant]:
    """The chain first: the others are compared with it."""
    found = [Variant("chain", CHAIN, False)]
    channels = case.widths[-1]
    pair = partial(Fusion, pairs=channels)
    if not cuda:
        found += [Variant(f"chunks of {rows}", Fusion(chunks=rows), False) for rows in chunks]
        return found
    found.append(Variant("chain", CHAIN, True))
    found.append(Variant("chunks by rule", Fusion(chunks=True), True))
    found.append(Variant("chunks by rule, launches overlapped", Fusion(chunks=True, overlap=True), True))
    found.append(Variant("pairs, default tile", pair(), True))
    found += [Variant(f"chunks of {rows}", Fusion(chunks=rows), True) for rows in chunks]
    found += [
        Variant(f"chunks of {rows}, launches overlapped", Fusion(chunks=rows, overlap=True), True) for rows in (8448, 33792)
    ]
    found.append(Variant("chain, launches overlapped", Fusion(overlap=True), True))
    for tile in TILES.get(channels, ())[1:]:
        name = f"pairs, {tile.rows} x {tile.middle}, {tile.warps} warps, {tile.stages} stages"
        found.append(Variant(name, pair(pair_tile=tile), True))
    found.append(Variant("pairs in chunks of 16896", pair(chunks=16896), True))
    return found


def stack(problem: Problem, function: Callable[..., tuple], seed: int | Tensor, pixels: int, **options) -> Tensor:
    """Colours `[B, pixels, C]` of the first pixels, whose noise is keyed by their index."""
    p = problem
    layers = (p.weights, p.styles, p.biases, p.strengths)
    rgbs = (p.rgb_weights, p.rgb_styles, p.rgb_biases, p.case.rgb_after)
    return function(p.x[:, :pixels], *layers, *rgbs, noise=seed, layout="bpc", **options)[1]


def widened(problem: Problem) -> Problem:
    """The same numbers in float64."""

    def wide(value: object) -> object:
        if isinstance(value, tuple) and all(isinstance(t, Tensor) for t in value):
            return tuple(t.double() for t in value)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Problem(**{name: wide(value) for name, value in vars(problem).items()})


def oracle(problem: Problem) -> tuple[Tensor, float]:
    """Float64 colours of the checked pixels, and the error allowed of others."""
    pixels = min(_CHECKED, problem.case.pixels)
    exact = stack(widened(problem), reference.modfc_stack, problem.seed, pixels)
    eager = stack(problem, reference.modfc_stack, problem.seed, pixels)
    return exact, EAGER_FACTOR * relative_error(eager, exact)


def prepare(variant: Variant, problem: Problem, chain: Tensor | None, exact: Tensor, allowed: float) -> Tensor | None:
    """Run a variant, compare it, and capture or wrap it to be timed. Returns its colours; what fails is noted in it."""
    call = partial(
        stack, problem, functional.modfc_stack, problem.seed, problem.case.pixels, want_features=False, backend="triton"
    )
    try:
        with using(variant.fusion):
            with poisoned_empty():
                found = call()
            variant.error = relative_error(found[:, : exact.shape[1]], exact)
            if not variant.error <= allowed:
                variant.fault = f"wrong: error {variant.error:.2e}, allowed {allowed:.2e}"
            elif chain is not None and not variant.fusion.pairs and not same(found, chain):
                variant.fault = "wrong: not the bits of the chain"
            elif variant.graph:
                output: list[Tensor] = []
                entry = captured([lambda: output.append(call())])
                output[-1].fill_(torch.nan)
                entry.call()
                if not torch.equal(output[-1], found):
                    variant.fault = "wrong: the graph gives other bits"
                variant.entry = entry
            else:
                variant.entry = Entry("", within(variant.fusion, call))
    except Exception as error:  # a tile that takes too much of a chip is an answer, too
        variant.fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        return None
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise on a GPU; the interpreter's products are NumPy's, whose last bits depend on a row's place."""
    return torch.equal(a, b) if a.is_cuda else torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def within(fusion: Fusion, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` under `fusion`."""

    def run() -> Tensor:
        with using(fusion):
            return call()

    return run


def run_case(case: Case, device: torch.device, ceilings: Ceilings, left: float, share: float, options: argparse.Namespace) -> list[dict]:
    """Rows of one case; of the seconds that are `left` compiling may take half, and timing a `share` of the rest."""
    problem = make_problem(case, device, options.seed)
    every = variants(case, device.type == "cuda", options.chunks)
    exact, allowed = oracle(problem)
    began, chain = time.perf_counter(), None
    for variant in progress.follow(f"{case}: compiling and checking", every):
        if chain is not None and time.perf_counter() - began > left / 2:
            variant.fault = "left out: no time"
            continue
        found = prepare(variant, problem, chain, exact, allowed)
        chain = found if chain is None else chain
    clock = Clock(device)
    limits = [entry for entry in ceilings.entries(case.dtype) if entry.name != COPY]
    entries = [*limits, *(v.entry for v in every if v.fault is None and v.entry is not None)]
    for entry in entries:
        clock.prepare(entry)
    show = partial(progress.follow, f"{case}: timing")
    seconds = max(1.0, (left - (time.perf_counter() - began)) * share)
    take_turns(entries, clock, rounds=60, least=5, seconds=seconds, progress=show)
    ceiling = ceilings.record(limits)[ceilings.name(MATMUL, case.dtype)]
    rows = [row_of(variant, case, ceiling) for variant in every]
    for row in rows:
        row["allowed"] = allowed
    return rows


def row_of(variant: Variant, case: Case, ceiling: float) -> dict[str, object]:
    """One row of the results: milliseconds an image, TFLOP/s, and its share of cuBLAS's rate in the same rounds."""
    row: dict[str, object] = {
        "case": str(case), "channels": case.widths[-1], "batch": case.batch, "variant": variant.name, "graph": variant.graph,
        "fault": variant.fault, "error": variant.error, "ceiling_tflops": ceiling,
    }  # fmt: skip
    if variant.fault is None and variant.entry is not None:
        rate = case.flops("forward") / variant.entry.median * 1e-9
        row |= {
            "ms_image": variant.entry.median / case.batch,
            "p20": variant.entry.percentile(0.2) / case.batch,
            "p80": variant.entry.percentile(0.8) / case.batch,
            "tflops": rate,
            "share": rate / ceiling,
            "samples": len(variant.entry.samples),
        }
    return row


def table(rows: Sequence[dict]) -> str:
    """Markdown, a table a case, each variant beside the chain launched in the same way."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        plain = {row["graph"]: row.get("ms_image") for row in mine if row["variant"] == "chain"}
        title = f"{case}, {mine[0]['channels']} channels (cuBLAS {mine[0]['ceiling_tflops']:.0f} TFLOP/s; error allowed"
        lines += [f"\n{title} {mine[0]['allowed']:.1e})\n", "| variant | ms an image | of the ceiling | of the chain | error |"]
        lines.append("|---|---|---|---|---|")
        for row in mine:
            name = f"{row['variant']}, in a CUDA graph" if row["graph"] else str(row["variant"])
            if row["fault"]:
                lines.append(f"| {name} | {row['fault']} | | | |")
                continue
            beside = plain.get(row["graph"])
            ratio = f"{row['ms_image'] / beside:.2f}x" if beside else ""
            numbers = f"{row['ms_image']:.3f} | {row['share']:.0%} | {ratio} | {row['error']:.1e}"
            lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=120, help="seconds for all of it, about")
    parser.add_argument("--json", default="triton_fusion.json", help="file for the numbers")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 1], help="images a call")
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 256], help="widths of the layers")
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="rows of a chunk")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--layers", type=int, default=15, help="of the stack, an odd number")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: the interpreter")
    options = parser.parse_args(arguments)
    for name in ("budget", "size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    if min(options.chunks) < 1:
        parser.error(f"--chunks: expected positive numbers, got {options.chunks}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where a variant was wrong."""
    options = parse(arguments)
    device = torch.device(options.device)
    began, rows = time.perf_counter(), []
    ceilings = Ceilings(device, small=device.type == "cpu")
    groups = [(channels, batch) for channels in options.channels for batch in options.batches]
    with torch.no_grad():
        for number, (channels, batch) in enumerate(groups):
            left = options.budget - (time.perf_counter() - began)
            if left <= 0:
                print(f"left out, no time: {groups[number:]} (channels, batch)", file=sys.stderr)
                break
            case = make_case(
                "stack", batch=batch, height=options.size, width=options.size, dtype=getattr(torch, options.dtype),
                channels=channels, layers=options.layers,
            )  # fmt: skip
            rows += run_case(case, device, ceilings, left, 0.8 / (len(groups) - number), options)
            results = {**machine.describe(device), "ceilings": ceilings.summary(), "rows": rows}
            machine.replace(Path(options.json), json.dumps(results, indent=1) + "\n")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(f"{machine.device_name(device)}, torch {torch.__version__}\n{table(rows)}")
    return int(any(str(row["fault"]).startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
