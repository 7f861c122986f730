"""`cips blend`: several latents in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..apps import blend, draw, mask_positions, pixel_weights
from ..apps.blend import DIRECTIONS
from ..errors import UsageError
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

EDGES = ("smooth", "hard")


def add(commands: Any, command: Command) -> None:
    parser = command(
        "cips blend CHECKPOINT [options]",
        "Draw one picture of several latents, each pixel with a blend of their styles. Try: cips blend runs/earth-64",
    )
    add_common(parser, "blend.png", "NAME.png", "as trained, or the mask's")
    parser.add_argument("--count", type=int, default=2, help="number of latents, at least 2")
    parser.add_argument(
        "--mask",
        type=str,
        default="horizontal",
        help="where the latents are: 'horizontal', 'vertical', or a grey picture of the size to draw, black for the "
        "first latent, white for the last",
    )
    parser.add_argument("--edge", type=str, default="smooth", help="'smooth': linear from one to the next; 'hard'")
    commands.add_subcommand("blend", parser, help="several latents in one picture")


def read_mask(path: str, size: tuple[int, int] | None) -> Tensor:
    """Grey levels from 0 to 1, float32 `[H, W]`.

    Raises:
        UsageError: no such file, not a picture, or not of `size`.
    """
    from PIL import Image

    if not Path(path).is_file():
        raise UsageError(f"mask: expected {', '.join(DIRECTIONS)} or a picture; no such file: {path}")
    try:
        with Image.open(path) as opened_mask:
            grey = np.asarray(opened_mask.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"mask: {path} is not a picture that can be read ({error})") from error
    if size is not None and grey.shape != size:
        came = f"{grey.shape[0]}x{grey.shape[1]}"
        raise UsageError(f"mask: expected {size[0]}x{size[1]}, as --size says, got {came}: {path}")
    return torch.from_numpy(grey / np.float32(255))


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
    mask: str,
    edge: str,
) -> int:
    check_out(out, ".png")
    if count < 2:
        raise UsageError(f"count: expected an integer of at least 2, got {count}")
    if edge not in EDGES:
        raise UsageError(f"edge: expected {' or '.join(EDGES)}, got {edge!r}")
    shape, seeded = parse_size(size), parse_noise(noise, seed)
    positions = None if mask in DIRECTIONS else read_mask(mask, shape)
    generator = opened(checkpoint, device, dtype)
    if positions is None:
        positions = mask_positions(shape or generator.config.size, mask)
    with usage_errors():
        z = draw.latents(generator, count, seed)
        weights = pixel_weights(positions, count, hard=edge == "hard")
        image = blend(generator, z, weights, truncation=truncation, noise=seeded)
    return save_picture(out, picture(image), f"{count} latents, {edge} edges", magnify)
