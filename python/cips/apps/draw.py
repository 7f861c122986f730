"""What the applications share: latents from a seed, and a picture drawn strip by strip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..generator import Generator

STRIPS = {"cpu": 1 << 14, "cuda": 1 << 18}  # pixels drawn at a time: some seconds of the paper's network on a CPU

Noise = int | str


def latents(generator: Generator, count: int, seed: int = 0) -> Tensor:
    """z `[count, style_dim]` ~ N(0, 1) on the generator's device: those of `cips sample` with the same seed and count.

    Raises:
        ValueError: a count below 1.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count: expected an integer of at least 1, got {count!r}")
    z = torch.randn(count, generator.config.style_dim, generator=torch.Generator().manual_seed(seed))
    return z.to(generator.w_mean)


def latent_batches(style_dim: int, count: int, batch: int, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
    """The rows of `latents`, on the CPU, `batch` at a time (the last may be shorter), each with its first row's number.

    Where style_dim is a multiple of 16, they are drawn as they are asked for and row k is the same for every count and
    batch: torch draws normal values in blocks of 16. Otherwise all are drawn at once, and a row may depend on the count.
    """
    random = torch.Generator().manual_seed(seed)
    whole = None if style_dim % 16 == 0 else torch.randn(count, style_dim, generator=random)
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        yield start, torch.randn(stop - start, style_dim, generator=random) if whole is None else whole[start:stop]


@torch.no_grad()
def sampled(
    sampler: Callable[..., Tensor],
    style_dim: int,
    count: int,
    batch: int,
    device: torch.device,
    *,
    seed: int = 0,
    noise: str = "seed",
    truncation: float = 1.0,
) -> Iterator[Tensor]:
    """`count` images, `batch` at a time: `[batch, 3, H, W]` on the device, the last shorter where `count` asks for it.

    Args:
        sampler: a `Sampler` of this batch, or a generator: called with z, `truncation` and `noise`.
        noise: "seed", each batch its own seed, since noise is keyed by the image's place in its batch; or "off".

    The host waits for nothing: a GPU gets its next batch while it draws this one.
    """
    for start, z in latent_batches(style_dim, count, batch, seed):
        wanted = len(z)
        z = torch.nn.functional.pad(z, (0, 0, 0, batch - wanted), value=1.0)  # the last batch may be short
        if device.type == "cuda":
            z = z.pin_memory()  # without it the copy would wait for the batch before
        z = z.to(device, non_blocking=True)
        yield sampler(z, truncation=truncation, noise="off" if noise == "off" else seed + start)[:wanted]


@torch.no_grad()
def styles(generator: Generator, z: Tensor, truncation: float = 1.0) -> Tensor:
    """w `[K, style_dim]` of z `[K, style_dim]`, each row mapped alone, so that its bits do not depend on the others.

    Raises:
        ValueError, TypeError: as `Generator.styles`.
    """
    if z.dim() != 2:
        raise ValueError(f"z: expected [K, {generator.config.style_dim}], got {list(z.shape)}")
    return torch.cat([generator.styles(z[k : k + 1], truncation=truncation) for k in range(len(z))])


def strip_size(device: torch.device) -> int:
    """Pixels that are drawn at a time on a device."""
    return STRIPS.get(device.type, STRIPS["cuda"])


@torch.no_grad()
def draw(
    generator: Generator,
    w: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    coords: Tensor | None = None,
    blend: Tensor | None = None,
    noise: Noise = 0,
    label: str = "drawing",
) -> Tensor:
    """One picture of any size, with a progress bar where it takes over two seconds.

    Args:
        w: `[style_dim]`, or W+ `[n_styles, style_dim]`; with `blend` K of them.
        size: (height, width) of the full grid; None: the generator's own.
        coords: instead of `size`, a grid `[H, W, 2]`.
        blend: `[H, W, K]`, the weights of the K styles at each pixel. Where each pixel has at most two that are not
            zero, pixels of the same two are drawn together, since the kernel of blends takes two.
        noise: an int seed, or "off".

    Returns:
        float32 `[3, H, W]` on the generator's device. Each pixel is computed alone, so that strips change nothing
        but how many pixels of activations there are at a time.

    Raises:
        ValueError, TypeError: as `Generator.forward`, naming the argument.
    """
    from tqdm import tqdm

    whole = {"input_is_w": True, "noise": noise}
    if coords is None:
        height, width = grids.as_size(generator.config.size if size is None else size)
    elif size is not None:
        raise ValueError(f"size: expected None where coords are given, got {size!r}")
    else:
        height, width = coords.shape[:2]
    strip_pixels = strip_size(w.device)
    if blend is not None and blend.shape[-1] > 2 and not (blend.count_nonzero(-1) > 2).any():
        points = grids.full(height, width, device=w.device) if coords is None else coords
        return _draw_by_pairs(generator, w, points, blend, strip_pixels, label, **whole)
    if height * width <= strip_pixels:
        place = {"size": (height, width)} if coords is None else {"coords": coords}
        return generator(w[None], **place, **whole, blend=blend)[0]
    device, rows = w.device, max(1, strip_pixels // width)
    picture = torch.empty((3, height, width), dtype=generator.w_mean.dtype, device=device)
    with tqdm(total=height, desc=label, unit="row", delay=2, leave=False) as bar:
        for top in range(0, height, rows):
            count = min(rows, height - top)
            if coords is None:
                strip = grids.tile((height, width), top, 0, count, width, device)
            else:
                strip = coords[top : top + count]
            weights = None if blend is None else blend[top : top + count]
            picture[:, top : top + count] = generator(w[None], strip, **whole, blend=weights)[0]
            bar.update(count)
    return picture


def _draw_by_pairs(
    generator: Generator, w: Tensor, coords: Tensor, blend: Tensor, strip_pixels: int, label: str, **options: Any
) -> Tensor:
    """The picture of a blend whose pixels have at most two weights each that are not zero."""
    from tqdm import tqdm

    height, width, count = blend.shape
    present = (blend != 0).flatten(0, 1)
    one = present.int().argmax(-1)
    other = count - 1 - present.flip(-1).int().argmax(-1)
    other = torch.where(one == other, torch.where(one == 0, 1, one - 1), other)  # any: its weight is zero
    pairs = torch.stack((torch.minimum(one, other), torch.maximum(one, other)), -1)
    picture = torch.empty((height * width, 3), dtype=generator.w_mean.dtype, device=w.device)
    with tqdm(total=height * width, desc=label, unit="pixel", unit_scale=True, delay=2, leave=False) as bar:
        for pair in pairs.unique(dim=0):
            for pixels in (pairs == pair).all(-1).nonzero()[:, 0].split(strip_pixels):
                points, weights = coords.flatten(0, 1)[pixels], blend.flatten(0, 1)[pixels][:, pair]
                picture[pixels] = generator(w[pair][None], points, blend=weights, **options)[0]
                bar.update(len(pixels))
    return picture.T.reshape(3, height, width)
