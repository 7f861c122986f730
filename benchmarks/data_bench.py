"""Images a second of the training data: decoded from a folder and from a zip, by N threads, and from the warm cache.

    python benchmarks/data_bench.py                            # 400 random JPEGs of 512 px, to 256 px
    python benchmarks/data_bench.py --data PATH --size 256     # your images, in place of them

Each row is the best of `--rounds`: the machine's disk cache is warm, so this measures decoding and scaling. `decode`
rows read every image into memory; `cache` opens the finished cache and reads every page of it; `batches` makes
training batches (random order, mirrored, turned, float32) from it. Everything written lies in a temporary folder that
goes at the end; `--json PATH` keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from cips.data import Batches, Preparation, StoredImages, decoded_images, open_container  # noqa: E402
from cips.errors import UsageError  # noqa: E402


def write_images(folder: Path, count: int, side: int) -> None:
    """Random JPEGs with structure at every scale, so that they cost what photographs cost to decode."""
    from PIL import Image
    from tqdm import tqdm

    random = np.random.default_rng(0)
    folder.mkdir()
    for k in tqdm(range(count), desc="writing images", delay=2, leave=False):
        image = np.zeros((side, side, 3))
        for cells in (4, 16, 64, 256):
            noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            image += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.5
        image *= 255 / image.max()
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{k:05d}.jpg", quality=90)


def write_zip(folder: Path, path: Path) -> None:
    """The folder's files, stored, as StyleGAN's dataset_tool does."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)


def rate(count: int, function: Callable[[], object], rounds: int) -> float:
    """The best number of images a second."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return count / min(times)


def measure(sources: dict[str, str], options: argparse.Namespace, scratch: Path) -> list[tuple[str, int | None, float]]:
    """Rows (what, threads, images a second)."""
    preparation = Preparation(options.size, too_small="enlarge")
    rows: list[tuple[str, int | None, float]] = []

    def decode(path: str, workers: int | None, cache: str) -> object:
        with open_container(path, options.size) as container:
            return decoded_images(container, preparation, cache=cache, workers=workers)

    for name, path in sources.items():
        with open_container(path, options.size) as container:
            count = len(container)
        for workers in options.workers:
            speed = rate(count, lambda p=path, w=workers: decode(p, w, "off"), options.rounds)
            rows.append((f"decode {name}", workers, speed))
    cache = str(scratch / "cache")
    decoded = decode(path, None, cache)
    rows.append(("cache", None, rate(count, lambda: decode(path, None, cache).pixels.sum(), options.rounds)))
    batches = Batches(StoredImages(decoded, options.size, name).to(options.device), options.batch, rotate=True)
    steps = max(1, len(decoded.names) // options.batch)

    def run() -> None:
        for step in range(steps):
            batches(step)
        if torch.device(options.device).type == "cuda":
            torch.cuda.synchronize()

    run()
    rows.append((f"batches, {options.device}", None, rate(steps * options.batch, run, options.rounds)))
    return rows


def table(rows: list[tuple[str, int | None, float]]) -> str:
    """Markdown."""
    lines = ["| what | threads | images/s |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {threads or ''} | {speed:,.0f} |" for what, threads, speed in rows])


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder, zip, LMDB or shards to read instead of random images")
    parser.add_argument("--images", type=int, default=400, help="random images to write")
    parser.add_argument("--side", type=int, default=512, help="pixels a side of the random images")
    parser.add_argument("--size", type=int, default=256, help="training size")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="threads to try")
    parser.add_argument("--batch", type=int, default=32, help="images a batch")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the batches")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args(arguments)
    for name in ("images", "side", "size", "batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected an integer of at least 1, got {getattr(options, name)}")
    options.workers = list(dict.fromkeys(options.workers))
    with tempfile.TemporaryDirectory(prefix="cips-data-bench-") as scratch:
        try:
            if options.data:
                sources = {options.data: options.data}
            else:
                folder, archive = Path(scratch) / "images", Path(scratch) / "images.zip"
                write_images(folder, options.images, options.side)
                write_zip(folder, archive)
                sources = {"folder": str(folder), "zip": str(archive)}
            rows = measure(sources, options, Path(scratch))
        except UsageError as error:
            print(f"data_bench: error: {error}", file=sys.stderr)
            return 2
    what = options.data or f"{options.images} JPEGs of {options.side} px"
    print(f"{what} to {options.size} px; {platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}\n")
    print(table(rows))
    if options.json:
        keys = ("what", "threads", "images_per_second")
        Path(options.json).write_text(json.dumps([dict(zip(keys, row)) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
