"""`cips mix`: the layers of one image with the styles of another."""

from __future__ import annotations

from typing import Any

import torch

from ..apps import draw, layer_groups, mix, paper_groups
from ..errors import UsageError
from ..pictures import image_grid, to_uint8
from .shared import (
    Command,
    add_common,
    check_out,
    opened,
    parse_noise,
    parse_size,
    save_picture,
    usage_errors,
)


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips mix CHECKPOINT [options]",
        "Draw rows of images A, B, and A with the style of B in some groups of layers. Try: cips mix runs/earth-64",
    )
    add_common(parser, "mix.png", "NAME.png")
    parser.add_argument("--rows", type=int, default=4, help="number of pairs A, B")
    parser.add_argument(
        "--groups",
        type=str,
        default="auto",
        help="groups of layers that take B's style, one picture each, such as 6-8,3-5,1-2 (the paper's, and what "
        "'auto' takes of a generator of 8 groups) or 1+4-5; group 1 is the first layer, each other one two layers",
    )
    commands.add_subcommand("mix", parser, help="layers of one image with the style of another")


def parse_groups(text: str, count: int) -> list[list[int]]:
    """Groups of each picture, from "6-8,3-5,1+2".

    Raises:
        UsageError: not of that form, or a group that is not there.
    """
    if text == "auto":
        return paper_groups(count)
    result = []
    for column in text.split(","):
        chosen: list[int] = []
        for part in column.split("+"):
            ends = part.strip().split("-")
            if len(ends) > 2 or not all(end.isascii() and end.isdecimal() for end in ends):
                raise UsageError(f"groups: expected groups such as 6-8,3-5,1-2, got {text!r}")
            first, last = int(ends[0]), int(ends[-1])
            if not 1 <= first <= last <= count:
                raise UsageError(f"groups: this generator has groups 1 to {count}, got {part.strip()!r}")
            chosen.extend(range(first, last + 1))
        result.append(chosen)
    return result


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
    rows: int,
    groups: str,
) -> int:
    from tqdm import tqdm

    check_out(out, ".png")
    if rows < 1:
        raise UsageError(f"rows: expected an integer of at least 1, got {rows}")
    shape, seeded = parse_size(size), parse_noise(noise, seed)
    generator = opened(checkpoint, device, dtype)
    chosen = parse_groups(groups, len(layer_groups(generator.config)))
    with usage_errors():
        pairs = draw.latents(generator, 2 * rows, seed).unflatten(0, (rows, 2))
        options = {"size": shape, "truncation": truncation, "noise": seeded}
        bar = tqdm(pairs, unit="row", delay=2, leave=False)
        images = torch.cat([to_uint8(mix(generator, a, b, chosen, **options)) for a, b in bar])
    names = ", ".join("+".join(str(group) for group in part) for part in chosen)
    grid = image_grid(images, columns=2 + len(chosen))
    return save_picture(out, grid, f"columns A, B, and A with B in groups {names}", magnify)
