"""`cips giga`: an image of any size, written tile by tile."""

from __future__ import annotations

from typing import Any

from ..apps import draw, giga
from .shared import Command, add_common, check_out, opened, parse_noise, parse_size, usage_errors


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips giga CHECKPOINT [options]",
        "Write one image of any size as a tiled TIFF, with the memory of one tile. "
        "Try: cips giga runs/earth-64 --size 4096",
    )
    add_common(parser, "giga.tif", "NAME.tif", "4096", magnify=False)
    parser.add_argument("--tile", type=int, default=512, help="pixels a side of a tile, a multiple of 16")
    commands.add_subcommand("giga", parser, help="an image of any size, written tile by tile")


def run(
    checkpoint: str,
    out: str,
    seed: int,
    truncation: float,
    size: str | None,
    noise: str,
    device: str,
    dtype: str,
    tile: int,
) -> int:
    check_out(out, ".tif", ".tiff")
    height, width = parse_size(size) or (4096, 4096)
    seeded = parse_noise(noise, seed)
    generator = opened(checkpoint, device, dtype)
    with usage_errors():
        z = draw.latents(generator, 1, seed)
        giga(out, generator, z[0], (height, width), tile=tile, truncation=truncation, noise=seeded)
    print(f"{out}: {height}x{width} in tiles of {tile}")
    return 0
