"""A style a pixel, a blend of two an image, beside one style an image: the stack from coordinates to colours, in one run.

    python benchmarks/blend_bench.py                                             # on a GPU: the paper's stack, bfloat16
    python benchmarks/blend_bench.py --device cpu --channels 32 --layers 3 --size 16 --samples 3           # tries it out

The points are the table's own grid; weights and styles are random, and so are the blends of every pixel. Both ways are
called as CUDA graphs on a GPU, taking turns of a third of a second, as in `memory_bench.py`: by then a card at its power
limit has come to the clock that the call's own power allows. In `brief` turns of some 10 ms a call gets the clock that the
other has left it, to the disadvantage of whoever draws less; that ratio has the same target.

Before it is timed each way's colours are compared with the float64 oracle at random pixels; more than twice the error of
eager PyTorch in the same dtype ends the run.

Target on an H100: two styles at most 1.3 times the time of one, in long turns and in brief ones; a miss is printed, and the
exit status is 1. The file is
benchmarks/results/blends/<device>.json, or `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import machine  # noqa: E402
from cases import DTYPES  # noqa: E402
from cips_kernels import Encoding, encoding, functional, reference  # noqa: E402
from cips_kernels.testing import EAGER_FACTOR, StackCase, random_stack, relative_error  # noqa: E402
from measure import Clock, Entry, captured, take_turns  # noqa: E402
from progress import follow  # noqa: E402

TARGET = 1.3
TURN = 300.0  # milliseconds of a turn
SECONDS = 12.0  # of long turns, and half as many of brief ones
SEED = 5


class Problem:
    """One number of images: a case and its encoding, with one style an image (kinds 0) or blends of two."""

    def __init__(self, options: argparse.Namespace, batch: int, kinds: int, device: torch.device) -> None:
        width, size = options.channels, options.size
        after = tuple(range(2, options.layers, 2)) or (options.layers - 1,)
        dtype = DTYPES[options.dtype]
        case = random_stack((2 * width, *(width,) * options.layers), after, batch=batch, pixels=1, noise=SEED, dtype=dtype, blended=kinds)
        draw = torch.Generator().manual_seed(SEED)
        if kinds:
            case = case.map(lambda name, t: torch.rand(batch, size * size, kinds, generator=draw) if name == "blend" else t)
        self.case: StackCase = case.to(device)
        weight, bias, table = (torch.randn(*shape, generator=draw) for shape in ((width, 2), (width,), (size, size, width)))
        self.encoding = Encoding(weight.to(device) * 2, bias.to(device), table.to(device, dtype), size=(size, size), dtype=dtype)

    @torch.no_grad()
    def colours(self) -> Tensor:
        """`[B, P, 3]` of every pixel, as it is timed."""
        return _colours(functional.modfc_stack, self.case, self.encoding, want_features=False)

    @torch.no_grad()
    def error(self, sample: int) -> tuple[float, float]:
        """Largest relative error of some pixels, and that of eager PyTorch in the same dtype."""
        e = self.encoding
        chosen = torch.randperm(e.pixels, generator=torch.Generator().manual_seed(SEED))[:sample].to(e.table.device)
        found = self.colours()[:, chosen]
        case = self.case.map(lambda name, t: t[:, chosen] if name == "blend" else t)

        def formulation(dtype: torch.dtype) -> Tensor:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            some = e._replace(
                fourier_weight=e.fourier_weight.to(wide), fourier_bias=e.fourier_bias.to(wide), table=e.table.to(wide),
                coords=encoding.points(e)[chosen], size=None, dtype=dtype,
            )  # fmt: skip
            parts = case.cast(dtype)
            x, places = encoding.encode(some), some.coords
            return _colours(reference.modfc_stack, parts, x, coords=places, layout="bpc")

        exact = formulation(torch.float64)
        return relative_error(found, exact), relative_error(formulation(e.dtype), exact)


def _colours(function: Callable[..., tuple], case: StackCase, first: Tensor | Encoding, **more: object) -> Tensor:
    groups = (case.weights, case.styles, case.biases, case.noise_strengths, case.rgb_weights, case.rgb_styles, case.rgb_biases)
    return function(first, *groups, case.rgb_after, noise=case.noise, blend=case.blend, **more)[1]


def rows(options: argparse.Namespace, clock: Clock) -> list[dict[str, object]]:
    """One for each number of images.

    Raises:
        ValueError: colours miss the oracle.
    """
    found: list[dict[str, object]] = []
    for batch in options.batch:
        row: dict[str, object] = {"batch": batch}
        entries = []
        for name, kinds in (("one", 0), ("two", 2)):
            problem = Problem(options, batch, kinds, clock.device)
            error, eager = problem.error(options.sample)
            row |= {f"{name}_error": error, f"{name}_error_eager": eager}
            if not error <= EAGER_FACTOR * eager:
                raise ValueError(f"{name}: error {error:.1e}, expected at most {EAGER_FACTOR} x {eager:.1e}")
            entry = captured([problem.colours]) if clock.cuda else Entry("", problem.colours)
            entry.name = name
            clock.prepare(entry)
            entries.append(entry)
        for kind, turn, seconds in (("brief_", None, SECONDS / 2), ("", TURN, SECONDS)):
            for entry in entries:
                entry.samples.clear()
                if turn is not None and clock.cuda:
                    entry.repeats = max(1, round(turn / clock.time(entry.call)))
            progress = partial(follow, f"{batch} images, {kind.strip('_') or 'long'} turns")
            take_turns(entries, clock, rounds=options.samples, least=3, seconds=seconds, progress=progress)
            one, two = (entry.median for entry in entries)
            row |= {f"one_{kind}ms": one, f"two_{kind}ms": two, f"{kind}ratio": two / one}
        found.append(row)
    return found


def report(results: dict) -> tuple[str, bool]:
    """What was found in words, and whether the target is met."""
    o = results["options"]
    lines = [f"{results['device']}: {o['layers']} layers of {o['channels']}, {o['size']}x{o['size']}, {o['dtype']}; milliseconds an image"]
    lines += [
        f"  B = {row['batch']:<3} one style {row['one_ms'] / row['batch']:.3f}, two a pixel {row['two_ms'] / row['batch']:.3f}: "
        f"{row['ratio']:.3f}, in brief turns {row['brief_ratio']:.3f} (at most {TARGET})"
        for row in results["rows"]
    ]
    return "\n".join(lines), all(row[name] <= TARGET for row in results["rows"] for name in ("ratio", "brief_ratio"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--batch", default="1,4,16", help="images, such as 1,4,16 (the default)")
    found.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    found.add_argument("--channels", type=int, default=512, help="of a layer; of the input twice as many (default: 512)")
    found.add_argument("--layers", type=int, default=15, help="default: 15")
    found.add_argument("--samples", type=int, default=30, help="most of each way taking turns (default: 30)")
    found.add_argument("--sample", type=int, default=500, help="pixels that are compared with the oracle (default: 500)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--dtype", default="bfloat16", help=f"of {', '.join(DTYPES)} (default: bfloat16)")
    found.add_argument("--out", type=Path, default=None, help="the file to write")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; exits with status 2 on a bad one, as argparse does."""
    command = parser()
    options = command.parse_args(arguments)
    try:
        options.batch = [int(part) for part in options.batch.split(",")]
    except ValueError:
        command.error(f"--batch: expected numbers of images such as 1,4,16, got {options.batch!r}")
    least = {"size": 2, "channels": 1, "layers": 1, "samples": 3, "sample": 1}
    for name, value in ((name, getattr(options, name)) for name in least):
        if value < least[name]:
            command.error(f"--{name}: expected an integer of at least {least[name]}, got {value}")
    if min(options.batch) < 1:
        command.error(f"--batch: expected at least one image, got {min(options.batch)}")
    if options.dtype not in DTYPES:
        command.error(f"--dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 where the target is missed or colours are wrong, 2 for a bad argument."""
    options = parse(arguments)
    device = torch.device(options.device)
    try:
        found = rows(options, Clock(device))
    except ValueError as error:
        print(f"blend_bench: error: {error}", file=sys.stderr)
        return 1
    results = machine.describe(device) | {"options": {k: v for k, v in vars(options).items() if k != "out"}, "rows": found}
    path = machine.write(results, "blends", options.out)
    text, met = report(results)
    print(f"{text}\n{path} written")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
