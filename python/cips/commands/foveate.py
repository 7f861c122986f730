"""`cips foveate`: some pixels computed, the rest filled."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..apps import draw, foveate
from ..errors import UsageError
from ..pictures import image_grid, to_uint8
from .shared import (
    Command,
    add_common,
    check_out,
    opened,
    parse_noise,
    parse_point,
    parse_size,
    save_picture,
    usage_errors,
)


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips foveate CHECKPOINT [options]",
        "Draw an image of which only some pixels are computed, most of them where the gaze is, the rest filled by "
        "cubic interpolation. Above, the computed pixels alone. Try: cips foveate runs/earth-64",
    )
    add_common(parser, "foveated.png", "NAME.png")
    parser.add_argument("--shares", type=str, default="5,25,50,100", help="percent of the pixels, one picture each")
    parser.add_argument("--gaze", type=str, default="0,0", help="X,Y of the gaze, from -1 to 1")
    parser.add_argument("--sigma", type=float, default=0.4, help="deviation of the density in fractions of the size")
    commands.add_subcommand("foveate", parser, help="compute only the pixels that are looked at")


def parse_shares(text: str) -> list[float]:
    """Shares from percents, "5,25,50,100"."""
    shares = []
    for part in text.split(","):
        try:
            percent = float(part)
        except ValueError as error:
            raise UsageError(f"shares: expected percents such as 5,25,50,100, got {text!r}") from error
        if not 0 < percent <= 100:
            raise UsageError(f"shares: expected percents above 0 and at most 100, got {part.strip()}")
        shares.append(percent / 100)
    return shares


def saving(seconds: float, whole: float) -> str:
    """What computing some pixels took less than the whole image, in words."""
    if seconds > whole:
        return f"{seconds - whole:.3f} s more than the whole image"
    return f"{whole - seconds:.3f} s saved ({1 - seconds / whole:.0%})"


@torch.no_grad()
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
    shares: str,
    gaze: str,
    sigma: float,
) -> int:
    from tqdm import tqdm

    check_out(out, ".png")
    chosen, point = parse_shares(shares), parse_point(gaze, "gaze")
    shape, seeded = parse_size(size), parse_noise(noise, seed)
    generator = opened(checkpoint, device, dtype)
    above, below = [], []
    with usage_errors():
        z = draw.latents(generator, 1, seed)
        generator.styles(z)  # what is made at a first call is not timed
        rehearse = generator.w_mean.is_cuda  # nor, on a GPU, the compilation of kernels for a size
        for _ in range(2 if rehearse else 1):
            began = time.perf_counter()
            draw.draw(generator, draw.styles(generator, z, truncation)[0], size=shape, noise=seeded).cpu()
            whole = time.perf_counter() - began
        print(f"the whole image: computed in {whole:.3f} s")
        options = {"gaze": point, "sigma": sigma, "seed": seed, "size": shape, "truncation": truncation}
        for share in tqdm(chosen, unit="picture", delay=2, leave=False):
            found = foveate(generator, z[0], share, noise=seeded, rehearse=rehearse, **options)
            image = to_uint8(found.image[None])[0]
            alone = torch.full_like(image, 255)
            rows, columns = found.positions.T
            alone[rows, columns] = image[rows, columns]
            above.append(alone)
            below.append(image)
            times = f"computed in {found.draw_seconds:.3f} s, {saving(found.draw_seconds, whole)}"
            tqdm.write(f"{100 * share:g}%: {len(found.positions)} pixels {times}; filled in {found.fill_seconds:.3f} s")
    grid = image_grid(torch.stack(above + below), columns=len(chosen))
    return save_picture(out, grid, f"computed pixels above, filled below, {shares} percent", magnify)
