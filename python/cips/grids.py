"""Coordinate grids: float32 `[H, W, 2]`, channel 0 = x (along a row), channel 1 = y (down the rows), ends
inclusive.

Every coordinate comes from an integer position by one formula,

    t(i; n) = (2 i - (n - 1)) / (n - 1)        t(0) = -1, t(n - 1) = +1  (CIPS section 3: x' = 2 x / (W - 1) -
    1)

evaluated in float64 from integers and rounded once. It is a function of the rational number alone, so a point
has the same bits in a full grid, a patch, a tile or a denser grid, on any device. Counter-based noise is
keyed by those bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cips_kernels.encoding import coordinate

__all__ = [
    "WRAPS",
    "as_size",
    "coordinate",
    "cylinder",
    "dense",
    "foveated",
    "from_positions",
    "full",
    "patch",
    "patches",
    "parse_size",
    "pixels",
    "points",
    "tile",
    "window",
]

Device = torch.device | str | None
WRAPS = ("mirror", "ring")


def from_positions(rows: Tensor, columns: Tensor, size: int | Sequence[int]) -> Tensor:
    """Grid `[len(rows), len(columns), 2]` of the given integer rows and columns of an image of `size`."""
    height, width = as_size(size)
    y, x = coordinate(rows, height), coordinate(columns, width)
    return torch.stack((x[None, :].expand(len(rows), -1), y[:, None].expand(-1, len(columns))), -1)


def full(height: int, width: int, device: Device = None) -> Tensor:
    """Every pixel of a `height` x `width` image: `[height, width, 2]`. A larger size than trained samples
    denser.
    """
    height, width = as_size((height, width))
    rows = torch.arange(height, device=device)
    return from_positions(rows, torch.arange(width, device=device), (height, width))


def dense(height: int, width: int, factor: int, device: Device = None) -> Tensor:
    """A grid `factor` times finer that still holds every pixel: `[factor (height-1) + 1, factor (width-1) +
    1, 2]`.

    Entry `[factor * r, factor * c]` has the bits of entry `[r, c]` of `full(height, width)`.
    """
    height, width = as_size((height, width))
    if factor < 1:
        raise ValueError(f"factor: expected an integer of at least 1, got {factor!r}")
    return full(factor * (height - 1) + 1, factor * (width - 1) + 1, device)


def patch(
    size: int | Sequence[int],
    k: int | Sequence[int],
    sigma: int = 1,
    offset: Sequence[int] = (0, 0),
    device: Device = None,
) -> Tensor:
    """A patch of an image: `k` rows and columns, `sigma` pixels apart (CIPS supplement, section 2).

    Args:
        size: (height, width) of the whole image, or one number for a square.
        k: (rows, columns) of the patch, or one number.
        sigma: step between its pixels; 1 is dense, more is dilated.
        offset: (top, left), the image's row and column of the patch's first pixel. The paper's condition is
            0 <= left < width - (K - 1) sigma, and the same for the rows.

    Returns:
        `[rows, columns, 2]`.

    Raises:
        ValueError: the patch does not lie inside the image.
    """
    size, k = as_size(size), as_size(k, "k")
    if sigma < 1:
        raise ValueError(f"sigma: expected an integer of at least 1, got {sigma!r}")
    for name, start, count, limit in zip(("top", "left"), offset, k, size):
        if start < 0 or start + (count - 1) * sigma >= limit:
            raise ValueError(
                f"offset: {name}={start} puts {count} pixels, {sigma} apart, outside an image of {limit}; "
                f"expected 0 <= {name} < {limit - (count - 1) * sigma}"
            )
    rows, columns = (start + sigma * torch.arange(count, device=device) for start, count in zip(offset, k))
    return from_positions(rows, columns, size)


def patches(rows: Tensor, columns: Tensor, size: int | Sequence[int]) -> Tensor:
    """One patch an image: the grids of integer rows `[B, h]` and columns `[B, w]` of an image of `size`.

    Nothing is read on the host, so a device can draw the positions itself; they are not checked.

    Returns:
        `[B, h, w, 2]`, each with the bits of `patch`.
    """
    height, width = as_size(size)
    y, x = coordinate(rows, height), coordinate(columns, width)
    high, wide = rows.shape[1], columns.shape[1]
    return torch.stack((x[:, None, :].expand(-1, high, -1), y[:, :, None].expand(-1, -1, wide)), -1)


def tile(
    size: int | Sequence[int], top: int, left: int, height: int, width: int, device: Device = None
) -> Tensor:
    """The `height` x `width` rectangle of an image of `size` whose first pixel is (`top`, `left`)."""
    return patch(size, (height, width), 1, (top, left), device)


def window(
    size: int | Sequence[int],
    centre: Sequence[float] = (0.0, 0.0),
    zoom: float = 1.0,
    device: Device = None,
) -> Tensor:
    """What a picture of `size` shows of the image magnified `zoom` times: `[height, width, 2]`.

    The window is a rectangle of `full(round(zoom height), round(zoom width))` and has its bits.

    Args:
        size: (height, width) of the window, which is the whole image at zoom 1.
        centre: (x, y) in [-1, 1] of the point in the middle; a window that would stick out is moved inside.
        zoom: at least 1.

    Raises:
        ValueError: naming the argument.
    """
    size = as_size(size)
    centre = _point(centre, "centre")
    if not math.isfinite(zoom) or zoom < 1:
        raise ValueError(f"zoom: expected a number of at least 1, got {zoom!r}")
    whole = [round(zoom * n) for n in size]
    first = []
    for t, count, limit in zip(reversed(centre), size, whole):
        start = round((t + 1) / 2 * (limit - 1) - (count - 1) / 2)
        first.append(min(max(start, 0), limit - count))
    return patch(whole, size, 1, first, device)


def pixels(positions: Tensor, size: int | Sequence[int]) -> Tensor:
    """Coordinates `[..., 2]` (x, y) of the pixels at integer positions `[..., 2]` (row, column) of an image of `size`.

    Raises:
        TypeError, ValueError: not integers, not pairs, or outside the image.
    """
    height, width = as_size(size)
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions: expected an integer tensor [..., 2], got {kind}")
    if positions.shape[-1:] != (2,):
        raise ValueError(f"positions: expected [..., 2], got {list(positions.shape)}")
    limit = torch.tensor((height, width), device=positions.device)
    if ((positions < 0) | (positions >= limit)).any():
        raise ValueError(f"positions: expected rows below {height} and columns below {width}, none negative")
    return torch.stack((coordinate(positions[..., 1], width), coordinate(positions[..., 0], height)), -1)


def points(values: Sequence[Sequence[float]] | Tensor, device: Device = None) -> Tensor:
    """Any points (x, y), from numbers to float32 `[P, 2]`.

    Raises:
        ValueError: not pairs of finite numbers.
    """
    try:
        found = torch.as_tensor(values, dtype=torch.float32, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"values: expected pairs of numbers, got {values!r}") from error
    if found.dim() != 2 or found.shape[1] != 2 or not found.isfinite().all():
        raise ValueError(f"values: expected finite numbers [P, 2], got shape {list(found.shape)}")
    return found


def foveated(
    size: int | Sequence[int],
    share: float,
    gaze: Sequence[float] = (0.0, 0.0),
    sigma: float = 0.4,
    seed: int = 0,
    device: Device = None,
) -> tuple[Tensor, Tensor]:
    """Pixels of an image drawn without replacement, dense around the gaze and sparse elsewhere (CIPS section 4.7).

    The density is a Gaussian of the distance from the gaze, each side measured in its own length:
    p ~ exp(-(dx^2 + dy^2) / (2 sigma^2)). A pixel is drawn, then another from those left, and so on; all at once
    by adding Gumbel noise to log p and taking the greatest.

    Args:
        size: (height, width) of the image, or one number.
        share: share of its pixels that is drawn, above 0 and at most 1; the paper shows 0.05, 0.25, 0.5 and 1.
        gaze: (x, y) in [-1, 1].
        sigma: standard deviation in fractions of the size; the paper's is 0.4.
        seed: the same seed, the same pixels, on any device.

    Returns:
        (points, positions): float32 `[P, 2]` (x, y), with the bits of the full grid, and int64 `[P, 2]` (row,
        column), in the order of the image. P is `share` of the pixels, rounded, at least 1.

    Raises:
        ValueError: naming the argument.
    """
    height, width = as_size(size)
    gaze = _point(gaze, "gaze")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share!r}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a number above 0, got {sigma!r}")
    grid = full(height, width).double()
    fractions = (grid - torch.tensor(gaze, dtype=torch.float64)) / 2  # a side is 2 long
    log_density = -fractions.square().sum(-1).flatten() / (2 * sigma**2)
    random = torch.Generator().manual_seed(seed)  # of the CPU, so that every device gets the same pixels
    uniform = torch.rand(log_density.shape, dtype=torch.float64, generator=random)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    count = max(1, round(share * height * width))
    index = torch.topk(log_density + gumbel, count).indices.sort().values
    positions = torch.stack((index // width, index % width), -1).to(device)
    return pixels(positions, (height, width)), positions


def cylinder(
    height: int,
    width: int,
    angle: int = 360,
    *,
    start: int = 0,
    wrap: str = "mirror",
    inner: float = 0.25,
    device: Device = None,
) -> Tensor:
    """A panorama: column i looks in the direction phi = start + angle i / width, and phi + 360 is phi again.

    The paper trains on crops "from the cylindrical coordinate grid" (section 4.8) and gives no formula. A point of
    a cylinder has three coordinates (cos phi, sin phi, y), and the encodings here take two, so that a closed seam
    asks for a map from the cylinder into the plane:

    "mirror": x runs from -1 at phi = 0 to +1 at 180 degrees and back, x = 4 |phi / 360 - round(phi / 360)| - 1.
        It suits every generator, whatever its table, but the second half shows the first one mirrored; give the
        halves styles of their own (`cips.apps.panorama`) to tell them apart. With 2 (W - 1) columns, the first W
        have the bits of `full(height, W)`.
    "ring": the cylinder laid flat, (x, y) = rho (cos phi, sin phi), rho from 1 in the first row to `inner` in the
        last. No point occurs twice. It is for a generator trained on crops of this grid (slices of
        `grid.roll(shift, 1)`), as the paper trains, or for pictures that have no upper side, such as the earth
        from above.

    Args:
        height, width: of the panorama; there is no column for phi = start + angle, which at 360 is the first one.
        angle: degrees that the panorama spans, an integer from 1 to 360.
        start: direction of the first column in degrees, an integer.
        wrap: "mirror" or "ring".
        inner: radius of the last row with "ring", above 0 and below 1.

    Returns:
        float32 `[height, width, 2]`; one turn on, the same bits.

    Raises:
        ValueError: naming the argument.
    """
    height, width = as_size((height, width))
    for name, value, low, high in (("angle", angle, 1, 360), ("start", start, -math.inf, math.inf)):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            limits = f" from {low} to {high}" if name == "angle" else ""
            raise ValueError(f"{name}: expected whole degrees{limits}, got {value!r}")
    if wrap not in WRAPS:
        raise ValueError(f"wrap: expected {' or '.join(WRAPS)}, got {wrap!r}")
    if not 0 < inner < 1:
        raise ValueError(f"inner: expected a number above 0 and below 1, got {inner!r}")
    # phi is step / turn of a turn, in integers: one turn on and on either side of a mirror the bits agree
    turn = 360 * width
    step = (start % 360 * width + angle * torch.arange(width)) % turn
    rows = torch.arange(height)
    if wrap == "mirror":
        x = coordinate(2 * torch.minimum(step, turn - step), turn + 1)
        y = coordinate(rows, height)
        return torch.stack((x[None, :].expand(height, -1), y[:, None].expand(-1, width)), -1).to(device)
    phi = step.double() * (2 * math.pi / turn)
    radius = (1 + inner) / 2 - (1 - inner) / 2 * coordinate(rows, height).double()
    ring = torch.stack((phi.cos(), phi.sin()), -1)
    return (radius[:, None, None] * ring).float().to(device)  # sines of the CPU: the same bits on any device


def as_size(size: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        ValueError: not one or two integers of at least 1.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair):
        raise ValueError(f"{name}: expected one or two integers of at least 1, (height, width), got {size!r}")
    return pair


def parse_size(text: int | str, name: str = "size") -> tuple[int, int]:
    """(height, width) from 256, "256" or "256x512", HEIGHTxWIDTH.

    Raises:
        ValueError: something else.
    """
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}: expected a number of at least 1 or HEIGHTxWIDTH, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _point(value: Sequence[float], name: str) -> tuple[float, float]:
    pair = tuple(value)
    if len(pair) != 2 or not all(-1 <= t <= 1 for t in pair):
        raise ValueError(f"{name}: expected (x, y), each from -1 to 1, got {value!r}")
    return pair
