"""`cips sample`: images from latents, as one grid or as a folder of PNGs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cips_kernels.encoding import LOOKUPS

from ..apps import draw
from ..errors import UsageError
from ..folders import PngFolder, default_workers, on_host
from ..generator import Generator
from ..pictures import image_grid, quantised, save_png
from ..sampler import Sampler
from ..stylegan2 import StyleGAN2
from ..training.config import DTYPES
from .shared import Command, check_out, opened_any


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips sample CHECKPOINT [options]",
        "Draw images from a trained generator, as one grid or as a folder of PNGs. "
        "Try: cips sample runs/earth-64 --out samples --count 10000 --dtype bfloat16",
    )
    parser.add_argument(
        "checkpoint", type=str, help="a generator.safetensors, the folder of a run, or an official .pt"
    )
    parser.add_argument(
        "--out", type=str, default="samples.png", help="NAME.png for a grid, a folder for one PNG an image"
    )
    parser.add_argument("--count", type=int, default=36, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="of the latents and the noise")
    parser.add_argument(
        "--truncation", "--psi", type=float, default=1.0, help="1: none; towards 0: towards the mean image"
    )
    parser.add_argument(
        "--size", type=int, default=None, help="pixels a side, by default as trained; larger: denser"
    )
    parser.add_argument("--noise", type=str, default="seed", help="'seed': noise from --seed; 'off'")
    parser.add_argument(
        "--lookup", type=str, default="exact", help="of the table; 'compat': as the official code when evaluated"
    )
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="processes that encode a folder's files; 0: this one; by default, for many images, a processor each but one",
    )
    parser.add_argument(
        "--level", type=int, default=1, help="compression of a folder's files, 0 (none) to 9 (slow)"
    )
    parser.add_argument(
        "--device", type=str, default="auto", help="'cuda', 'cpu', ...; 'auto' takes a GPU if there is one"
    )
    parser.add_argument("--dtype", type=str, default="float32", help=f"arithmetic: {' or '.join(DTYPES)}")
    commands.add_subcommand("sample", parser, help="draw images from a trained generator")


@torch.no_grad()
def run(
    checkpoint: str,
    out: str,
    count: int,
    seed: int,
    truncation: float,
    size: int | None,
    noise: str,
    lookup: str,
    batch: int,
    workers: int | None,
    level: int,
    device: str,
    dtype: str,
) -> int:
    from tqdm import tqdm

    for name, value in (("count", count), ("batch", batch), ("size", size)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected an integer of at least 1, got {value}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers: expected an integer of at least 0, got {workers}")
    if not 0 <= level <= 9:
        raise UsageError(f"level: expected an integer from 0 to 9, got {level}")
    if noise not in ("seed", "off"):
        raise UsageError(f"noise: expected 'seed' or 'off', got {noise!r}")
    if lookup not in LOOKUPS:
        raise UsageError(f"lookup: expected {' or '.join(LOOKUPS)}, got {lookup!r}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    check_out(out)
    generator = opened_any(checkpoint, device, dtype)
    height, width = generator.config.size if size is None else (size, size)
    if size is not None and isinstance(generator, StyleGAN2):
        own = "x".join(str(n) for n in generator.config.size)
        raise UsageError(f"size: expected none for a StyleGAN2, which draws {own} pixels")
    if workers is None:
        workers = default_workers(count * height * width)
    images = _images(generator, count, min(batch, count), seed, truncation, size, noise, lookup)
    parts: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        if Path(out).suffix.lower() == ".png":
            write = lambda pixels: parts.append(pixels.copy())  # noqa: E731
        else:
            write = stack.enter_context(PngFolder(out, workers=workers, level=level)).write
        bar = stack.enter_context(tqdm(total=count, unit="image", delay=2, leave=False))
        for pixels in on_host(images):
            write(pixels)
            bar.update(len(pixels))
    if parts:
        save_png(out, image_grid(torch.from_numpy(np.concatenate(parts))))
    print(f"{out}: {count} images of {height}x{width} from {checkpoint}")
    return 0


def _images(
    generator: Generator | StyleGAN2,
    count: int,
    batch: int,
    seed: int,
    truncation: float,
    size: int | None,
    noise: str,
    lookup: str,
) -> Iterator[Tensor]:
    """uint8 `[batch, H, W, 3]` on the generator's device, the last one shorter where `count` asks for it."""
    options = {"seed": seed, "noise": noise, "truncation": truncation}
    try:
        sampler: Any = generator
        if isinstance(generator, Generator):
            sampler = Sampler(generator, batch, size=size, lookup=lookup)
        device = generator.w_mean.device
        for images in draw.sampled(sampler, generator.config.style_dim, count, batch, device, **options):
            yield quantised(images)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"batch: {batch} images at a time do not fit the device's memory; try --batch 1"
        ) from error
