"""Images a second from latents to a folder of PNGs beside synthesis alone, and the time of a foveated quarter beside the
whole image, in one run.

    python benchmarks/sample_bench.py                                  # 10,000 images of 256x256, the paper's network
    python benchmarks/sample_bench.py --device cpu --preset small --count 64 --size 32 --workers 2      # tries it out

`synthesis` draws all images and keeps none. `folder` does what `cips sample` does with a folder: draws, rounds to 8 bits on
the device, copies, encodes in processes, writes; from the first image, with the processes started, to the last file;
`start_seconds` is what starting them takes beside that, which the command hides behind loading and capturing. The two take
turns, `--rounds` times, and a row is the median. Weights are random: their pictures hold the noise of every layer, which
PNG compresses worse than a photograph.

`quarter` is `grids.foveated` at 25% of the pixels, drawn by a `Sampler` from latents to colours on the device, without
the filling, beside the full image drawn by another; milliseconds of a call, taking turns.

Targets on an H100: the folder at half the rate of synthesis, the quarter at 0.35 of the time; a miss is printed, and the
exit status is 1. The file is benchmarks/results/samples/<device>.json, or `--out`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import machine  # noqa: E402
from cips import Generator, Sampler, grids  # noqa: E402
from cips.apps import draw  # noqa: E402
from cips.errors import UsageError  # noqa: E402
from cips.folders import PngFolder, on_host, processors  # noqa: E402
from cips.pictures import quantised  # noqa: E402
from measure import Clock, Entry, take_turns  # noqa: E402

FOLDER_TARGET = 0.5
QUARTER_TARGET = 0.35
SHARE = 0.25


def images(sampler: Sampler, options: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """`[batch, 3, H, W]` on the device, as `cips sample` draws them."""
    style_dim = sampler.generator.config.style_dim
    return draw.sampled(sampler, style_dim, options.count, options.batch, device)


def synthesis(sampler: Sampler, options: argparse.Namespace, clock: Clock) -> float:
    """Seconds for drawing every image."""
    clock.synchronize()
    began = time.perf_counter()
    for _ in images(sampler, options, clock.device):
        pass
    clock.synchronize()
    return time.perf_counter() - began


def folder(sampler: Sampler, options: argparse.Namespace, clock: Clock, path: Path) -> tuple[float, float, int]:
    """Seconds for starting the processes, seconds for every file, bytes written."""
    began = time.perf_counter()
    with PngFolder(path, workers=options.workers, level=options.level) as target:
        target.wait_for_workers()
        started = time.perf_counter()
        drawn = images(sampler, options, clock.device)
        for pixels in on_host(quantised(batch) for batch in drawn):
            target.write(pixels)
    ended = time.perf_counter()
    files = list(path.iterdir())
    if len(files) != options.count:
        raise RuntimeError(f"{path}: {len(files)} files, expected {options.count}")
    return started - began, ended - started, sum(file.stat().st_size for file in files)


def folder_rows(sampler: Sampler, options: argparse.Namespace, clock: Clock) -> dict[str, object]:
    """Rates of synthesis and of the folder, and their ratio."""
    alone, whole, starts, size = [], [], [], 0
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        alone.append(synthesis(sampler, options, clock))
        with tempfile.TemporaryDirectory(prefix="cips-sample-bench-", dir=options.scratch) as scratch:
            start, seconds, size = folder(sampler, options, clock, Path(scratch) / "images")
        starts.append(start)
        whole.append(seconds)
    rates = [options.count / statistics.median(seconds) for seconds in (alone, whole)]
    return {
        "synthesis_images_per_second": rates[0],
        "folder_images_per_second": rates[1],
        "ratio": rates[1] / rates[0],
        "start_seconds": statistics.median(starts),
        "bytes_an_image": size // options.count,
        "seconds": {"synthesis": alone, "folder": whole},
    }


def quarter_rows(generator: Generator, options: argparse.Namespace, clock: Clock) -> list[dict[str, object]]:
    """Milliseconds of the full image and of a foveated quarter, for one image and for a batch."""
    shape = (options.size, options.size)
    points, _ = grids.foveated(shape, SHARE, device=clock.device)
    rows: list[dict[str, object]] = []
    for batch in dict.fromkeys((1, options.batch)):
        z = torch.randn(batch, generator.config.style_dim, device=clock.device)
        calls = {"full": Sampler(generator, batch, size=shape), "quarter": Sampler(generator, batch, coords=points)}
        entries = [Entry(name, lambda call=call, z=z: call(z, noise=0)) for name, call in calls.items()]
        for entry in entries:
            clock.prepare(entry)
        take_turns(entries, clock, rounds=options.samples, least=3, seconds=20.0, progress=lambda turns: turns)
        full, quarter = (entry.median for entry in entries)
        rows.append({"batch": batch, "full_ms": full, "quarter_ms": quarter, "ratio": quarter / full})
    return rows


def report(results: dict) -> tuple[str, bool]:
    """What was found in words, and whether every target is met."""
    rows, o = results["folder"], results["options"]
    lines = [
        f"{results['device']}: {o['count']} images of {o['size']}x{o['size']}, {o['preset']}, {o['dtype']}, {o['batch']} at a time",
        f"  synthesis alone   {rows['synthesis_images_per_second']:8.1f} images/s",
        f"  PNG folder        {rows['folder_images_per_second']:8.1f} images/s, {o['workers']} workers, level {o['level']}, "
        f"{rows['bytes_an_image'] / 1e3:.0f} kB an image; workers start in {rows['start_seconds']:.1f} s",
        f"  ratio             {rows['ratio']:8.2f} (at least {FOLDER_TARGET})",
    ]
    lines += [
        f"  foveated {SHARE:.0%}, B = {row['batch']}: {row['quarter_ms']:.3f} ms of {row['full_ms']:.3f} ms, "
        f"{row['ratio']:.2f} (at most {QUARTER_TARGET})"
        for row in results["quarter"]
    ]
    met = rows["ratio"] >= FOLDER_TARGET and all(row["ratio"] <= QUARTER_TARGET for row in results["quarter"])
    return "\n".join(lines), met


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--count", type=int, default=10_000, help="images (default: 10000)")
    found.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    found.add_argument("--preset", default="paper", help="the generator (default: paper)")
    found.add_argument("--batch", type=int, default=16, help="images at a time (default: 16)")
    found.add_argument("--workers", type=int, default=None, help="default: a processor each but one")
    found.add_argument("--level", type=int, default=1, help="of compression, 0 to 9 (default: 1)")
    found.add_argument("--rounds", type=int, default=3, help="of synthesis and folder (default: 3)")
    found.add_argument("--samples", type=int, default=30, help="most of the quarter (default: 30)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--dtype", default=None, help="bfloat16 or float32 (default: bfloat16 on a GPU)")
    found.add_argument("--scratch", default=None, help="folder for the images, which go at the end")
    found.add_argument("--out", type=Path, default=None, help="the file to write")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Checked options; exits with status 2 on a bad one, as argparse does."""
    command = parser()
    options = command.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    options.workers = max(1, processors() - 1) if options.workers is None else options.workers
    for name, least in (("count", 1), ("size", 2), ("batch", 1), ("rounds", 1), ("samples", 3), ("workers", 0)):
        if getattr(options, name) < least:
            command.error(f"--{name}: expected an integer of at least {least}, got {getattr(options, name)}")
    if options.dtype not in ("bfloat16", "float32"):
        command.error(f"--dtype: expected bfloat16 or float32, got {options.dtype!r}")
    if not 0 <= options.level <= 9:
        command.error(f"--level: expected an integer from 0 to 9, got {options.level}")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 where a target is missed, 2 for a bad argument."""
    options = parse(arguments)
    device = torch.device(options.device)
    clock = Clock(device)
    torch.manual_seed(0)
    try:
        generator = Generator(options.preset, dtype=getattr(torch, options.dtype)).to(device).eval()
        for layer in generator.synthesis.layers:
            layer.noise_strength.fill_(0.05)  # zero at the start of training: nothing would be drawn
        sampler = Sampler(generator, options.batch, size=options.size)
        sampler(torch.randn(options.batch, generator.config.style_dim, device=device), noise=0)  # compiles, captures
        results = machine.describe(device) | {
            "options": {k: v for k, v in vars(options).items() if k not in ("out", "scratch")},
            "processors": processors(),
            "folder": folder_rows(sampler, options, clock),
            "quarter": quarter_rows(generator, options, clock),
        }
    except (UsageError, ValueError) as error:
        print(f"sample_bench: error: {error}", file=sys.stderr)
        return 2
    path = machine.write(results, "samples", options.out)
    text, met = report(results)
    print(f"{text}\n{path} written")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
