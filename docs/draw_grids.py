"""The pictures of docs/grids.md: where the points of each grid lie. Run as `python docs/draw_grids.py` with Pillow installed.

Every picture shows the square [-1, 1] x [-1, 1], y downwards, with the pixels of a whole image in grey and the grid's points
from blue, the first, to orange, the last; those of the cylinder by their direction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from torch import Tensor  # noqa: E402

from cips import grids  # noqa: E402

SIDE, MARGIN = 224, 20  # pixels of a picture and of the border round the square
FINER = 4  # drawn so much larger, then reduced: smooth dots
GREY, LINE = (205, 205, 205), (150, 150, 150)
FIRST, LAST = (20, 80, 170), (240, 130, 20)

Draw = ImageDraw.ImageDraw


def dots(
    draw: Draw,
    points: Tensor,
    radius: float,
    *,
    grey: bool = False,
    ring: bool = False,
    span: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Points `[..., 2]` (x, y) as dots of `radius` pixels, or as rings, in the colours of `span`."""
    flat = points.reshape(-1, 2)
    for k, (x, y) in enumerate(flat.tolist()):
        share = span[0] + (span[1] - span[0]) * k / max(1, len(flat) - 1)
        colour = GREY if grey else tuple(round(a + (b - a) * share) for a, b in zip(FIRST, LAST))
        middle = [FINER * (MARGIN + (t + 1) / 2 * (SIDE - 2 * MARGIN)) for t in (x, y)]
        box = [m - FINER * radius for m in middle] + [m + FINER * radius for m in middle]
        if ring:
            draw.ellipse(box, outline=colour, width=FINER)
        else:
            draw.ellipse(box, fill=colour)


def picture(paint: Callable[[Draw], None]) -> Image.Image:
    """The square with its frame and middle lines, and what `paint` adds."""
    image = Image.new("RGB", (FINER * SIDE, FINER * SIDE), "white")
    draw = ImageDraw.Draw(image)
    low, middle, high = FINER * MARGIN, FINER * SIDE // 2, FINER * (SIDE - MARGIN)
    draw.rectangle((low, low, high, high), outline=LINE, width=2)
    draw.line((middle, low, middle, high), fill=(230, 230, 230), width=2)
    draw.line((low, middle, high, middle), fill=(230, 230, 230), width=2)
    paint(draw)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def among(whole: Tensor, points: Tensor, radius: float = 3.0) -> Callable[[Draw], None]:
    """Points among the pixels of a whole image."""

    def paint(draw: Draw) -> None:
        dots(draw, whole, 1.4, grey=True)
        dots(draw, points, radius)

    return paint


def mirrored(draw: Draw) -> None:
    # the second half comes back over the first: rings round its dots
    turn = grids.cylinder(9, 24).transpose(0, 1)
    dots(draw, turn[:13], 2.4, span=(0, 0.5))
    dots(draw, turn[13:], 4.6, ring=True, span=(0.5, 1))


def pictures() -> dict[str, Image.Image]:
    """Every picture by its name."""
    sixteen, wide = grids.full(16, 16), grids.full(9, 17)
    star = torch.linspace(0, 2 * torch.pi, 61)
    curve = torch.stack(((0.7 + 0.25 * (5 * star).cos()) * star.cos(), (0.7 + 0.25 * (5 * star).cos()) * star.sin()), -1)
    paints = {
        "full": lambda draw: dots(draw, sixteen, 3),
        "wide": lambda draw: dots(draw, wide, 3),
        "dense": lambda draw: [dots(draw, grids.dense(9, 9, 3), 1.8), dots(draw, grids.full(9, 9), 4.2, ring=True)],
        "tile": among(sixteen, grids.tile(16, 3, 6, 5, 8)),
        "patch": among(sixteen, grids.patch(16, 5, sigma=3, offset=(1, 2))),
        "mirror": mirrored,
        "ring": lambda draw: dots(draw, grids.cylinder(6, 36, wrap="ring").transpose(0, 1), 2.4),
        "foveated": among(grids.full(32, 32), grids.foveated(32, 0.25, gaze=(-0.3, 0.2))[0], 2.2),
        "window": among(sixteen, grids.window(16, centre=(0.4, -0.3), zoom=3), 2.0),
        "points": lambda draw: dots(draw, grids.points(curve), 2.4),
    }
    return {name: picture(paint) for name, paint in paints.items()}


def main() -> int:
    """Writes docs/grids/*.png."""
    folder = Path(__file__).resolve().parent / "grids"
    folder.mkdir(exist_ok=True)
    for name, image in pictures().items():
        image.quantize(64).save(folder / f"{name}.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
