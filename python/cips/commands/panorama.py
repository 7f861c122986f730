"""`cips panorama`: a picture on a cylinder."""

from __future__ import annotations

from typing import Any

from ..apps import draw, panorama
from ..grids import WRAPS
from .shared import (
    Command,
    add_common,
    check_out,
    opened,
    parse_noise,
    parse_size,
    picture,
    save_picture,
    usage_errors,
)


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips panorama CHECKPOINT [options]",
        "Draw a panorama whose ends meet, with one latent or several round it. "
        "Try: cips panorama runs/earth-64 --count 3",
    )
    add_common(parser, "panorama.png", "NAME.png", "as dense as trained")
    parser.add_argument("--count", type=int, default=2, help="number of latents round the cylinder")
    parser.add_argument("--angle", type=int, default=360, help="degrees that the picture spans, 1 to 360")
    parser.add_argument("--start", type=int, default=0, help="direction of the first column in degrees")
    parser.add_argument(
        "--wrap",
        type=str,
        default="mirror",
        help=f"{' or '.join(WRAPS)}: how the cylinder is laid into the plane; 'mirror' suits every generator, 'ring' "
        "one trained on rings, or pictures without an upper side",
    )
    commands.add_subcommand("panorama", parser, help="a picture on a cylinder, whose ends meet")


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
    angle: int,
    start: int,
    wrap: str,
) -> int:
    check_out(out, ".png")
    shape, seeded = parse_size(size), parse_noise(noise, seed)
    generator = opened(checkpoint, device, dtype)
    with usage_errors():
        z = draw.latents(generator, count, seed)
        options = {"angle": angle, "start": start, "wrap": wrap}
        image = panorama(generator, z, size=shape, truncation=truncation, noise=seeded, **options)
    return save_picture(out, picture(image), f"panorama of {angle} degrees, {count} latents", magnify)
