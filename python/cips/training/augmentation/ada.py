"""Adaptive discriminator augmentation (Karras et al. 2020, "Training GANs with Limited Data", section 3, appendix B).

Every change happens to an image with probability p, independently of the others, in this order:

    blit       mirror; turn by 0..3 quarters; move by whole pixels, U(-1/8, 1/8) of each side
    geometry   scale by 2^N(0, 0.2^2); rotate; scale by s along x and 1/s along y, s = 2^N(0, 0.2^2); rotate; move by
               N(0, (1/8)^2) of each side. Angles are U(-pi, pi), each rotation with probability 1 - sqrt(1 - p), so that
               with probability p there is at least one
    colour     brightness + N(0, 0.2^2); contrast x 2^N(0, 0.5^2); mirror the brightness (I - 2 v v^T, v = (1, 1, 1) /
               sqrt 3); rotate the hue about v by U(-pi, pi); saturation x 2^N(0, 1)
    filter     four bands of frequencies, each x 2^N(0, 1), the expected power kept (`bands`)
    noise      + N(0, s^2) a pixel and channel, s = |N(0, 0.1^2)|
    cutout     zeros in a rectangle of half the sides, its centre anywhere (`corruption`)

The first three are the paper's "bgc", which it found to be best, and the default; all six its "bgcfnc". p starts at 0 and is
adapted: every fourth time that logits are seen, which is once a step, it moves by a fixed amount up or down, as r_t = E[sign D(real)] lies above or below the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .bands import Bands, band_gains
from .base import Augmentation, happens
from .corruption import cutout, noise
from .warp import Warp, blit

KINDS = ("blit", "geometry", "colour", "filter", "noise", "cutout")
DEFAULT = KINDS[:3]
SETS = {name: KINDS[: len(name)] for name in ("bg", "bgc", "bgcf", "bgcfn", "bgcfnc")}  # the paper's names of several
ADAPT_EVERY = 4  # calls of `observe`: one a step, or one a part of a batch that is computed in parts


class AdaptiveAugment(Augmentation):
    """The changes of some kinds with a probability that follows the discriminator's overfitting, or a fixed one.

    Args:
        kinds: a choice of `KINDS`.
        target: of r_t; the paper's is 0.6.
        images: p goes from 0 to 1 within so many real images, at the fastest; the paper's is 500,000.
        fixed: p, instead of an adaptive one.

    Attributes:
        probability: p, 0-d float32.
        tally: sum of the signs and number of logits since p last moved, and the number of calls, float64 `[3]`.
    """

    probability: Tensor
    tally: Tensor

    def __init__(
        self,
        kinds: Sequence[str] = DEFAULT,
        *,
        target: float = 0.6,
        images: float = 500_000,
        fixed: float | None = None,
    ) -> None:
        super().__init__()
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.target, self.images, self.fixed = target, images, fixed
        # a fixed one is an option of the run and not a part of its state
        start = torch.full((), 0.0 if fixed is None else float(fixed))
        self.register_buffer("probability", start, persistent=fixed is None)
        self.register_buffer("tally", torch.zeros(3, dtype=torch.float64), persistent=fixed is None)
        self.warp, self.bands = Warp(), Bands()

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if "blit" in self.kinds:
            images = blit(images, blits(self.probability, len(images), height, width)[:, :2])
        if "geometry" in self.kinds:
            images = self.warp(images, geometry(self.probability, len(images), height, width)[:, :2])
        if "colour" in self.kinds:
            matrix = colours(self.probability, len(images)).to(images.dtype)
            mixed = torch.einsum("boc,bchw->bohw", matrix[:, :3, :3], images)
            images = mixed + matrix[:, :3, 3, None, None]
        if "filter" in self.kinds:
            images = self.bands(images, band_gains(self.probability, len(images)))
        if "noise" in self.kinds:
            images = noise(images, self.probability)
        if "cutout" in self.kinds:
            images = cutout(images, self.probability)
        return images

    @torch.no_grad()
    def observe(self, real_logits: Tensor) -> None:
        """Adapts p on the device, so that a step can be part of a CUDA graph; all processes count together.

        Raises:
            RuntimeError: where processes train together, what `torch.distributed` raises.
        """
        if self.fixed is not None:
            return
        seen = torch.stack((real_logits.sign().sum(), torch.ones_like(real_logits).sum())).double()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        signs, logits = self.tally[:2] + seen
        steps = self.tally[2] + 1
        due = steps.remainder(ADAPT_EVERY) == 0
        move = (signs / logits - self.target).sign() * logits / self.images
        moved = (self.probability + move).clamp(0, 1)
        self.probability.copy_(torch.where(due, moved.float(), self.probability))
        kept = torch.where(due, 0.0, 1.0)
        self.tally.copy_(torch.stack((signs * kept, logits * kept, steps)))

    def adapted(self) -> Tensor | None:
        return None if self.fixed is not None else self.probability.clone()


def blits(probability: Tensor, count: int, height: int, width: int) -> Tensor:
    """Maps from output to input, `[count, 3, 3]`, of mirrorings, quarter turns and moves by whole pixels."""
    device = probability.device
    mirrored = happens(probability, count) & (torch.rand(count, device=device) < 0.5)
    turned = happens(probability, count)
    quarters = torch.randint(4, (count,), device=device) * turned
    moved = happens(probability, count)
    share = (torch.rand(2, count, device=device) * 2 - 1) / 8 * moved
    return (
        scales(1.0 - 2.0 * mirrored, torch.ones(count, device=device))
        @ rotations(quarters * (math.pi / 2)).round()
        @ translations(-(share[0] * width).round(), -(share[1] * height).round())
    )


def geometry(probability: Tensor, count: int, height: int, width: int) -> Tensor:
    """Maps from output to input, `[count, 3, 3]`, of scaling, rotation, stretching, rotation and translation."""
    device = probability.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, count, device=device)

    scale = torch.exp2(normal() * 0.2 * happens(probability, count))
    one_rotation = 1 - torch.sqrt(1 - probability)
    angles = []
    for _ in range(2):
        angle = (torch.rand(count, device=device) * 2 - 1) * math.pi
        angles.append(angle * happens(one_rotation, count))
    stretch = torch.exp2(normal() * 0.2 * happens(probability, count))
    move = normal(2) / 8 * happens(probability, count)
    return (
        scales(1 / scale, 1 / scale)
        @ rotations(-angles[0])
        @ scales(1 / stretch, stretch)
        @ rotations(-angles[1])
        @ translations(-move[0] * width, -move[1] * height)
    )


def colours(probability: Tensor, count: int) -> Tensor:
    """Maps of colours (r, g, b, 1), `[count, 4, 4]`."""
    device = probability.device
    eye = torch.eye(4, device=device)
    luma = torch.zeros(4, device=device)
    luma[:3] = 1 / math.sqrt(3)
    along = luma[:, None] * luma  # onto the grey axis

    def normal(deviation: float) -> Tensor:
        return (torch.randn(count, device=device) * deviation * happens(probability, count)).view(-1, 1, 1)

    shift = torch.zeros(4, 4, device=device)
    shift[:3, 3] = 1
    matrix = eye + normal(0.2) * shift
    contrast = torch.exp2(normal(0.5))
    colour = eye.clone()
    colour[3, 3].zero_()
    matrix = (contrast * colour + (eye - colour)) @ matrix
    mirrored = happens(probability, count) & (torch.rand(count, device=device) < 0.5)
    matrix = (eye - 2 * mirrored.view(-1, 1, 1) * along) @ matrix
    angle = (torch.rand(count, device=device) * 2 - 1) * math.pi * happens(probability, count)
    matrix = hue_rotations(angle) @ matrix
    saturation = torch.exp2(normal(1.0))
    return (along + (eye - along - (eye - colour)) * saturation + (eye - colour)) @ matrix


def hue_rotations(angle: Tensor) -> Tensor:
    """Rotations by `angle` `[B]` about the grey axis (1, 1, 1): `[B, 4, 4]`, by Rodrigues' formula."""
    v = 1 / math.sqrt(3)
    cross = torch.zeros(4, 4, device=angle.device)
    for (row, column), sign in zip(((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)), (-1, 1, 1, -1, -1, 1)):
        cross[row, column].fill_(sign * v)  # assigning a number would wait for the GPU
    along = torch.zeros(4, 4, device=angle.device)
    along[:3, :3] = 1 / 3
    flat = torch.eye(4, device=angle.device) - along
    flat[3, 3].zero_()
    last = torch.zeros(4, 4, device=angle.device)
    last[3, 3].fill_(1)
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return along + cosine * flat + sine * cross + last


def scales(x: Tensor, y: Tensor) -> Tensor:
    """`[B, 3, 3]` that multiply x and y."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix((x, zero, zero), (zero, y, zero), (zero, zero, one))


def rotations(angle: Tensor) -> Tensor:
    """`[B, 3, 3]` that turn (x, y) to (x cos - y sin, x sin + y cos)."""
    zero, one, cosine, sine = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return _matrix((cosine, -sine, zero), (sine, cosine, zero), (zero, zero, one))


def translations(x: Tensor, y: Tensor) -> Tensor:
    """`[B, 3, 3]` that add to x and y."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix((one, zero, x), (zero, one, y), (zero, zero, one))


def _matrix(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
