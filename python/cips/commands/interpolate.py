"""`cips interpolate`: a film from latent to latent."""

from __future__ import annotations

from typing import Any

from ..apps import draw, interpolate
from ..errors import UsageError
from ..films import check_film, save_film
from .shared import (
    Command,
    add_common,
    check_out,
    magnified,
    opened,
    parse_noise,
    parse_size,
    picture,
    usage_errors,
)


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips interpolate CHECKPOINT [options]",
        "Draw a film that goes over from one random image to the next. Try: cips interpolate runs/earth-64 --loop true",
    )
    add_common(parser, "interpolation.gif", "NAME.gif, NAME.mp4, or a folder for one PNG a frame")
    parser.add_argument("--count", type=int, default=4, help="number of latents on the way, at least 2")
    parser.add_argument("--frames", type=int, default=60, help="number of frames in all")
    parser.add_argument("--fps", type=float, default=20.0, help="frames a second")
    parser.add_argument("--space", type=str, default="w", help="what is interpolated: 'w', or 'z' before the mapping")
    parser.add_argument("--loop", type=bool, default=False, help="go back to the first image at the end")
    commands.add_subcommand("interpolate", parser, help="a film from one image to the next")


def run(
    checkpoint: str,
    out: str,
    seed: int,
    truncation: float,
    size: str | None,
    noise: str,
    device: str,
    dtype: str,
    magnify: int,
    count: int,
    frames: int,
    fps: float,
    space: str,
    loop: bool,
) -> int:
    from tqdm import tqdm

    check_out(out)
    check_film(out)
    if count < 2:
        raise UsageError(f"count: expected an integer of at least 2, got {count}")
    if not 0 < fps <= 100:
        raise UsageError(f"fps: expected a number above 0 and at most 100, got {fps}")
    shape, seeded = parse_size(size), parse_noise(noise, seed)
    generator = opened(checkpoint, device, dtype)
    with usage_errors():
        z = draw.latents(generator, count, seed)
        pictures = interpolate(
            generator, z, frames, space=space, loop=loop, size=shape, truncation=truncation, noise=seeded
        )
        bar = tqdm(pictures, total=frames, unit="frame", delay=2, leave=False)
        number = save_film(out, (magnified(picture(image), magnify) for image in bar), fps)
    print(f"{out}: {number} frames through {count} latents in {space}")
    return 0
