"""The benchmark: every provider checked against the oracle, then timed beside the others in one run.

    python benchmarks/modfc_bench.py

needs no arguments on any machine. On a GPU it takes the paper's 256x256 with 1, 4 and 16 images in bfloat16,
about six minutes with the compilations; on a CPU a smaller picture through fewer layers of the same widths,
under three. It times the whole generator, its layers, one of them, and the modulation. It prints tables and writes
`benchmarks/results/<device>.json` and `.svg`. See `checks.py` for what "right" means and `measure.py` for how time
is taken.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":  # before torch is imported, and only for a process of its own
    environment.prepare()

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# a checkout that is not installed runs, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch

import generator_cases
import machine
import plot
import progress
import providers
import report
import tables
from cases import (
    CASES,
    COMPILED,
    DEPTH,
    DTYPES,
    FORWARD,
    GENERATOR,
    GENERATOR_ONLY,
    MODES,
    Case,
    make_case,
    make_problem,
)
from ceilings import Ceilings
from generator_cases import FOVEATED, OWN_TABLE, GeneratorCase
from generator_runner import GeneratorGroup
from measure import Clock
from runner import SPENT, Budget, Group, Options, Outcome, call_of, release

GPU_BUDGET, CPU_BUDGET = 360.0, 155.0  # seconds, the last group's end not counted
# A CPU's time goes to compilers. To compile the paper's 15 layers, forward and with backward, for each rival and
# dtype would take ten minutes; of the same widths, few layers over many pixels are more like it than the reverse:
# what a layer writes must exceed the caches, as a whole picture's does.
CPU_DEPTH = 3
CPU_SIDES = {48: 0.06, 32: 0.02, 16: 0.0}  # pixels, and the TFLOP/s that they take to end in time
ALL_CASES = (GENERATOR, *CASES)
ROWS = ("stack", GENERATOR, FOVEATED, OWN_TABLE, "layer", "modulate")  # order in the results
NAMES = (*providers.NAMES, *GENERATOR_ONLY)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description="Checks and times the modulated layers, ours beside PyTorch's own."
    )
    split = _split
    found.add_argument("--cases", type=split, default=None, help=f"of {','.join(ALL_CASES)} (default: all)")
    found.add_argument("--providers", type=split, default=None, help=f"of {','.join(NAMES)}")
    found.add_argument("--modes", type=split, default=None, help=f"of {','.join(MODES)} (default: both)")
    found.add_argument("--batch", type=split, default=None, help="images, such as 1,4,16")
    found.add_argument("--size", default=None, help="pixels, 256 or 256x128 (height x width)")
    found.add_argument("--channels", type=int, default=512, help="width of the layers (default: 512)")
    found.add_argument(
        "--layers", type=int, default=None, help=f"of the stack (default: {DEPTH}, on a CPU {CPU_DEPTH})"
    )
    found.add_argument("--dtype", type=split, default=None, help=f"of {','.join(DTYPES)}")
    found.add_argument("--device", default=None, help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    found.add_argument("--out", type=Path, default=machine.RESULTS, help="folder for JSON and plot")
    found.add_argument(
        "--budget", type=float, default=None, help="seconds that decide what is compiled and how many rounds"
    )
    found.add_argument(
        "--quick",
        action="store_true",
        help="the layers alone: one batch, small picture, few rounds, nothing compiled",
    )
    found.add_argument("--tf32", action="store_true", help="let float32 products use TF32, everywhere alike")
    found.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="write the picture"
    )
    found.add_argument("--seed", type=int, default=0, help="of all random tensors")
    found.add_argument(
        "--report", action="store_true", help="measure nothing: update the README from the results files"
    )
    return found


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _one_of(argument: str, got: Sequence[str], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for name in got:
        if name not in allowed:
            raise ValueError(f"{argument}: expected some of {', '.join(allowed)}, got {name!r}")


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--size: expected 256 or 256x128, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device: expected cuda, cuda:1 or cpu, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device: cuda asked for, but PyTorch sees no CUDA device")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def eager_rate(device: torch.device) -> float:
    """TFLOP/s of a small eager stack in float32, now: how fast this machine is, and how busy."""
    case = make_case("stack", batch=2, height=16, width=16, dtype=torch.float32)
    call = partial(
        call_of(providers.build("bmm", device, case.dtype), FORWARD), make_problem(case, device, 0)
    )
    call()
    clock = Clock(device)
    return case.flops(FORWARD) / statistics.median(clock.time(call) for _ in range(5)) * 1e-9


@dataclass(frozen=True)
class Terms:
    """What the cases of a run share: names of dtypes, numbers of images, pixels, and the stack's layers."""

    dtypes: list[str]
    batches: list[int]
    size: tuple[int, int]
    layers: int


def terms(chosen: argparse.Namespace, device: torch.device) -> Terms:
    """From the command line; a CPU's picture is sized by what it does now, so that a slow or busy one also ends in
    time."""
    cuda = device.type == "cuda"
    bf16 = machine.has_bf16(device)
    dtypes = chosen.dtype or (
        ["bfloat16" if bf16 else "float16"] if cuda else ["float32", *(["bfloat16"] if bf16 else [])]
    )
    batches = chosen.batch or ((["4"] if chosen.quick else ["16", "1", "4"]) if cuda else ["2"])
    _one_of("--dtype", dtypes, DTYPES)
    _one_of("--cases", chosen.cases or (), ALL_CASES)
    for batch in batches:
        if not batch.isdigit() or int(batch) < 1:
            raise ValueError(f"--batch: expected positive numbers, got {batch!r}")
    if chosen.size is not None:
        size = _size(chosen.size)
    elif chosen.quick:
        size = (64, 64) if cuda else (16, 16)
    elif cuda:
        size = (256, 256)
    else:
        rate = eager_rate(device)
        size = next((side, side) for side, least in CPU_SIDES.items() if rate >= least)
    layers = (DEPTH if cuda else CPU_DEPTH) if chosen.layers is None else chosen.layers
    return Terms(dtypes, [int(batch) for batch in batches], size, layers)


def plan(chosen: argparse.Namespace, device: torch.device, found: Terms | None = None) -> list[Case]:
    """The layers' cases to run, in order: what matters most first, since time may run out.

    For the same end, where neither cases nor dtypes are named, a CPU's second dtype is taken on the whole stack alone.
    """
    found = terms(chosen, device) if found is None else found
    cases = [name for name in chosen.cases or CASES if name in CASES]
    height, width = found.size
    shape = dict(height=height, width=width, channels=chosen.channels, layers=found.layers)
    short = not (device.type == "cuda" or chosen.cases or chosen.dtype)
    return [
        make_case(name, batch=batch, dtype=DTYPES[d], **shape)
        for d in found.dtypes
        for name in (cases if d == found.dtypes[0] or not short else cases[:1])
        for batch in found.batches
    ]


def plan_generator(chosen: argparse.Namespace, device: torch.device, found: Terms) -> list[GeneratorCase]:
    """The whole generator's cases; a CPU takes its first dtype alone unless dtypes are named."""
    wanted = GENERATOR in chosen.cases if chosen.cases else not chosen.quick
    if not wanted or (chosen.modes and FORWARD not in chosen.modes):
        return []
    cuda = device.type == "cuda"
    return generator_cases.plan(
        dtypes=found.dtypes if cuda or chosen.dtype else found.dtypes[:1],
        batches=found.batches,
        size=found.size,
        channels=chosen.channels,
        layers=found.layers,
        dense=cuda and chosen.size is None and not chosen.quick,
        named=chosen.providers is not None,
        cuda=cuda,
    )


def in_order(
    layers: Sequence[Case], whole: Sequence[GeneratorCase], cuda: bool
) -> list[Case | GeneratorCase]:
    """All cases, what matters most first: on a GPU the whole generator and the stack take turns, then comes the rest.

    A CPU's time is for the layers first, but its second dtype comes last.
    """
    if cuda:
        stacks = [case for case in layers if case.family == "stack"]
        rest = [case for case in layers if case.family != "stack"]
        return [*whole[:2], *stacks[:1], *whole[2:6], *stacks[1:2], *whole[6:], *stacks[2:], *rest]
    second = [case for case in layers if case.dtype != layers[0].dtype]
    return [*(case for case in layers if case not in second), *whole, *second]


def _say(text: str) -> None:
    print(text, flush=True)


def measure(
    cases: Sequence[Case | GeneratorCase],
    options: Options,
    ceilings: Ceilings,
    finished: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Run all cases within the budget; what no longer fits is left out, and listed."""
    total = Outcome()
    longest: dict[str, float] = {}  # seconds that a group of a case has taken
    for i, case in enumerate(cases):
        kind = GeneratorGroup if case.family == GENERATOR else Group
        names, modes = kind.chosen(case, options)
        options.say(f"\nchecking {case}: {', '.join(names)}")
        left = options.budget.left()
        # a machine that has become slow would overrun by a whole group
        if i > 0 and (left <= 0 or (left < longest.get(case.family, 0.0) / 2)):
            options.say(f"  left out: {SPENT}")
            total.leave_out(case, SPENT)
            continue
        followers = sum(following.family == case.family for following in cases[i + 1 :])
        share = max(left, 0) / (len(cases) - i) / max(1, len(modes))
        try:
            seconds = min(options.budget.seconds / 25, 0.4 * share)
            outcome = kind(case, options, ceilings).run(seconds, followers)
        except torch.cuda.OutOfMemoryError:
            outcome = Outcome()
            outcome.leave_out(case, "its inputs do not fit the device's memory")
            options.say(f"  left out: {outcome.left_out[-1]['reason']}")
        release(options.device)
        longest[case.family] = max(longest.get(case.family, 0.0), left - options.budget.left())
        total.rows += outcome.rows
        total.left_out += outcome.left_out
        finished(outcome)
    return total


def write(results: dict, folder: Path) -> Path:
    """Write `<device>.json`; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.slug(results['device'])}.json"
    machine.replace(path, json.dumps(results, indent=1) + "\n")
    return path


def setup(
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, Options, Ceilings, list[Case | GeneratorCase], Outcome]:
    """From the command line to what will be run, and what is left out from the start.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    chosen = parser().parse_args(arguments)
    device = _device(chosen.device)
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = chosen.tf32
    torch.backends.cudnn.benchmark = True  # the grouped convolution at its best
    names = list(chosen.providers or (*providers.default_names(device), *GENERATOR_ONLY))
    _one_of("--providers", names, NAMES)
    _one_of("--modes", chosen.modes or (), MODES)
    outcome = Outcome()
    if chosen.providers is None and chosen.quick:
        for name in [name for name in names if name in COMPILED]:
            names.remove(name)
            outcome.leave_out(None, "nothing is compiled with --quick unless named in --providers", name)
    options = Options(
        device=device,
        providers=names,
        modes=[mode for mode in MODES if mode in (chosen.modes or MODES)],
        sample=1024 if cuda else 256,
        rounds=5 if chosen.quick else 20 if cuda else 8,
        least_rounds=3,
        budget=Budget(chosen.budget or (GPU_BUDGET if cuda else CPU_BUDGET)),
        say=_say,
        progress=progress.follow,
        seed=chosen.seed,
    )
    ceilings = Ceilings(device, small=chosen.quick)
    found = terms(chosen, device)
    cases = in_order(plan(chosen, device, found), plan_generator(chosen, device, found), cuda)
    return chosen, options, ceilings, cases, outcome


def run(
    chosen: argparse.Namespace,
    options: Options,
    ceilings: Ceilings,
    cases: Sequence[Case | GeneratorCase],
    early: Outcome,
) -> dict:
    """Measure, print and write; returns what the results file holds."""
    head = machine.describe(options.device)
    _say(f"{head['device']}, torch {head['torch']}, triton {head['triton']}, commit {head['commit'][:12]}")
    if environment.busy:
        _say("other processes keep the processor busy: times on it mean little now")
    for item in early.left_out:
        _say(f"{item['provider']} left out: {item['reason']}")
    outcome = measure(cases, options, ceilings, lambda done: _say("\n" + report.terminal(done.rows)))
    results = head | {
        "seconds": round(options.budget.seconds - options.budget.left(), 1),
        "ceilings": ceilings.summary(),
        "rows": sorted(outcome.rows, key=_place),
        "left_out": early.left_out + outcome.left_out,
    }
    path = write(results, chosen.out)
    _say(f"\nceilings: {tables.ceilings_text(results)}\n{path} written, {results['seconds']:.0f} s")
    if chosen.plot:
        picture = path.with_suffix(".svg")
        reason = plot.draw(results, picture)
        _say(f"{picture} written" if reason is None else f"no plot: {reason}")
    return results


def _place(row: dict) -> tuple:
    return ROWS.index(row["case"]), row["dtype"], row["height"] * row["width"], row["batch"]


def is_fault(row: dict) -> bool:
    """Whether a failed row shows an error: wrong numbers, or a backend of ours that raised.

    A rival that cannot be compiled here (no C++ compiler, say) or does not fit the memory is nobody's fault.
    """
    if row["ok"]:
        return False
    ours = generator_cases.is_ours(row["provider"]) and row["reason"] != "out of memory"
    return row["error_eager"] is not None or ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, or 1 where a provider is at fault, or 2 for a bad argument."""
    if "--report" in (sys.argv[1:] if arguments is None else arguments):
        return report.main([])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA toolkit is no news
    try:
        everything = setup(arguments)
    except ValueError as error:
        print(f"modfc_bench.py: {error}", file=sys.stderr)
        return 2
    results = run(*everything)
    for row in (row for row in results["rows"] if not row["ok"]):
        place = f"{row['case']} {row['mode']} {row['dtype']} B={row['batch']}"
        _say(f"FAILED: {row['provider']}, {place}: {row['reason']}")
    return 1 if any(is_fault(row) for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
