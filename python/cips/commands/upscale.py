"""`cips upscale`: a denser grid beside Lanczos."""

from __future__ import annotations

from typing import Any

import torch

from ..apps import draw, upscale
from ..pictures import image_grid, to_uint8
from .shared import (
    Command,
    add_common,
    check_out,
    opened,
    parse_noise,
    parse_point,
    save_picture,
    usage_errors,
)


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips upscale CHECKPOINT [options]",
        "Draw an image larger than trained: on the left the trained size enlarged by Lanczos, on the right every pixel "
        "computed. Try: cips upscale runs/earth-64 --factor 4",
    )
    add_common(parser, "upscaled.png", "NAME.png", size=None)
    parser.add_argument("--factor", type=float, default=4.0, help="how many times the trained size")
    parser.add_argument(
        "--centre", type=str, default=None, help="X,Y from -1 to 1: show the trained size's window about this point"
    )
    commands.add_subcommand("upscale", parser, help="more pixels than trained, beside Lanczos")


def run(
    checkpoint: str,
    out: str,
    seed: int,
    truncation: float,
    noise: str,
    device: str,
    dtype: str,
    magnify: int,
    factor: float,
    centre: str | None,
) -> int:
    check_out(out, ".png")
    point, seeded = None if centre is None else parse_point(centre, "centre"), parse_noise(noise, seed)
    generator = opened(checkpoint, device, dtype)
    with usage_errors():
        z = draw.latents(generator, 1, seed)
        found = upscale(generator, z[0], factor, centre=point, truncation=truncation, noise=seeded)
    grid = image_grid(to_uint8(torch.stack((found.lanczos, found.dense))), columns=2)
    return save_picture(out, grid, f"Lanczos and computed, {factor:g} times the trained size", magnify)
