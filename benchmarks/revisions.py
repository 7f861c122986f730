"""Times checkouts of this package against one another, the first the one that others are compared with.

    python benchmarks/revisions.py ../before .                            # on a GPU, each built in its place
    python benchmarks/revisions.py ../before . --calls forward:1,forward+backward:4 --profile
    python benchmarks/revisions.py . . --device cpu --channels 16 --layers 3 --size 8 --seconds 1         # tries it out

Each has a process of its own, kept for the whole run, and they take turns of a third of a second, a large matrix product of
PyTorch's beside every turn: a card at its power limit gives a short call what rest has left, and numbers of two runs are of
two clocks. A call is that of the paper's stack in `modfc_bench.py`, on a GPU as a CUDA graph; `--profile` tells its kernels.
Nothing is checked here, and nothing written: results come from `modfc_bench.py`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
CALLS = "forward+backward:16,forward+backward:1"
MATMUL = "matmul"  # the name of the product among the calls


def parser() -> argparse.ArgumentParser:
    """The command line, which the processes of the checkouts get too."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("folders", nargs="+", type=Path, help="roots of checkouts, their extension built in place")
    made.add_argument("--calls", default=CALLS, help="MODE:IMAGES by commas; MODE is forward or forward+backward")
    made.add_argument("--seconds", type=float, default=30.0, help="of taking turns")
    made.add_argument("--turn", type=float, default=300.0, help="milliseconds of a turn")
    made.add_argument("--backend", default="cuda", help="on a CPU: cpu")
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--size", type=int, default=256)
    made.add_argument("--channels", type=int, default=512)
    made.add_argument("--layers", type=int, default=15)
    made.add_argument("--profile", action="store_true", help="tell each call's kernels once, by PyTorch's profiler")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def case_of(options: argparse.Namespace, call: str):  # -> cases.Case
    """What a call of `--calls` computes."""
    from cases import DTYPES, make_case

    return make_case(
        "stack", batch=int(call.rsplit(":", 1)[1]), height=options.size, width=options.size, dtype=DTYPES[options.dtype],
        channels=options.channels, layers=options.layers,
    )  # fmt: skip


def work(options: argparse.Namespace) -> None:
    """A checkout's process: for every line `CALL TURN` of its input, a turn's milliseconds, a line of milliseconds a call."""
    folder = options.folders[0].resolve()
    sys.path[:0] = [str(folder), str(folder / "python"), str(ROOT / "benchmarks")]
    import torch

    import cips_kernels

    if Path(cips_kernels.__file__).resolve().parent != folder / "cips_kernels":
        sys.exit(f"folders: {folder} holds no package cips_kernels, {cips_kernels.__file__} would be timed in its place")
    import providers
    from cases import DTYPES, make_problem
    from ceilings import MATMUL as PRODUCT
    from ceilings import Ceilings
    from measure import Clock, captured
    from runner import call_of

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    clock, calls = Clock(device), {}
    for name in options.calls.split(","):
        provider = providers.build(options.backend, device, dtype)
        problem = make_problem(case_of(options, name), device, 3)
        if provider.unavailable:
            sys.exit(f"backend: {provider.unavailable}")
        made = call_of(provider, name.rsplit(":", 1)[0])
        calls[name] = call = lambda made=made, problem=problem: made(problem)
        call()
        if clock.cuda:
            if options.profile:
                tell_kernels(f"{folder}, {name}", call)
            calls[name] = captured([call]).call
    ceilings = Ceilings(device, small=True)
    product = next(e for e in ceilings.entries(dtype) if e.name == ceilings.name(PRODUCT, dtype))
    calls[MATMUL] = product.call
    for call in calls.values():
        call()
    print("ready", ceilings.side, flush=True)
    for line in sys.stdin:
        name, turn = line.split()
        repeats = max(1, round(float(turn) / clock.time(calls[name])))
        print(clock.time(calls[name], repeats) / repeats, flush=True)


def tell_kernels(title: str, call: Callable[[], object]) -> None:
    """The kernels of a call that take longest, on stderr."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    time.sleep(1.0)  # a cool card, for all alike
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.device_time_total)
    lines = [f"{title}: {sum(row.device_time_total for row in rows) / 1e3:.3f} ms of kernels"]
    lines += [f"  {row.device_time_total / 1e3:8.3f} ms  {row.count:3d} x  {row.key[:100]}" for row in rows[:10]]
    print("\n".join(lines), file=sys.stderr, flush=True)


class Checkout:
    """A checkout and its process."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder = folder
        command = [sys.executable, str(HERE), str(folder), "--worker", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait(self) -> int:
        """Until it is ready; the side of its matrix product."""
        words = self.process.stdout.readline().split()
        if words[:1] != ["ready"]:
            raise SystemExit(f"{self.folder}: its process ended with status {self.process.wait()}")
        return int(words[1])

    def time(self, call: str, turn: float) -> float:
        """Milliseconds a call, over a turn."""
        self.process.stdin.write(f"{call} {turn}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main(arguments: list[str] | None = None) -> int:
    """Runs the processes and prints a line a call and checkout."""
    options = parser().parse_args(arguments)
    if options.worker:
        work(options)
        return 0
    sys.path.insert(0, str(HERE.parent))
    from progress import follow

    passed = [f"--{name}={value}" for name, value in vars(options).items() if name not in ("folders", "profile", "worker")]
    passed += ["--profile"] * options.profile
    checkouts = [Checkout(folder, passed) for folder in options.folders]
    sides = [checkout.wait() for checkout in checkouts]
    calls = options.calls.split(",")
    samples: dict[tuple[str, int], list[float]] = defaultdict(list)
    products: dict[str, list[float]] = defaultdict(list)
    end = time.monotonic() + options.seconds
    for number in follow("rounds", range(10_000)):
        if number >= 2 and time.monotonic() > end:
            break
        for call in calls:
            order = range(len(checkouts))
            for k in reversed(order) if number % 2 else order:
                samples[call, k].append(checkouts[k].time(call, options.turn))
                products[call].append(checkouts[k].time(MATMUL, options.turn))
    for call in calls:
        mode, images = call.rsplit(":", 1)
        flops = case_of(options, call).flops(mode)
        rate = 2 * sides[0] ** 3 / statistics.median(products[call]) / 1e9
        first = statistics.median(samples[call, 0])
        for k, checkout in enumerate(checkouts):
            ms = statistics.median(samples[call, k])
            share = flops / ms / 1e9 / rate
            print(
                f"{call}  {checkout.folder}: {ms:.4f} ms, {ms / int(images):.4f} an image, {ms / first:.4f} of the first, "
                f"{share:.1%} of the product's {rate:.3g} TFLOP/s"
            )
    for checkout in checkouts:
        checkout.process.stdin.close()
        checkout.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
