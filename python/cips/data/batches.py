"""The endless sequence of training batches, as a function of the step alone."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..grids import as_size
from .augment import augment
from .source import EVERY, ImageSource, normalise

_ORDER, _AUGMENT = 0, 1  # separate streams of random numbers from one seed


class Batches:
    """Batches of real images: every image once an epoch, in an order shuffled anew, cut out at random where the
    source has room, mirrored and turned.

    A batch depends on (seed, step) and on nothing before it, so a resumed run sees what it would have seen. The
    random numbers of a step come from the host's generator, in this order: offsets of the source, flips, turns; they
    are the same for every device, and pixels are only moved on the device that trains.

    Args:
        source: where images come from.
        batch: images a batch; it may exceed the source's and need not divide it.
        seed: of order, offsets, flips and turns.
        flip: mirror each image left to right with probability 1/2.
        rotate: turn each image, a square, by 0 to 3 quarters, equally likely.
        part: which images of a batch are made. Process r of n takes `slice(r, None, n)`, and all processes together
            see the batches that one alone would see.

    Raises:
        ValueError: a batch of none, a source without images, quarter turns of images that are not square.
    """

    def __init__(
        self,
        source: ImageSource,
        batch: int,
        *,
        seed: int = 0,
        flip: bool = True,
        rotate: bool = False,
        part: slice = EVERY,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
        if not len(source):
            raise ValueError(f"source: expected images, {source.name!r} has none")
        if rotate and len(set(as_size(source.size))) != 1:
            raise ValueError(f"rotate: expected square images to turn by quarters, got {source.size}")
        self.source, self.batch, self.seed = source, batch, seed
        self.flip, self.rotate, self.part = flip, rotate, part
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the images of a step, `[batch]`, all of them."""
        count, start = len(self.source), step * self.batch
        parts = []
        while start < (step + 1) * self.batch:
            epoch, first = divmod(start, count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(count)
            parts.append(self._order[first : first + (step + 1) * self.batch - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def __call__(self, step: int) -> Tensor:
        """Images of a step: float32 `[batch, 3, height, width]` in [-1, 1] on the source's device,
        channels-last; of the `part` alone.
        """
        random = np.random.default_rng((self.seed, _AUGMENT, step))
        images = self.source.images(self.indices(step), random, self.part)
        how = {"flip": self.flip, "rotate": self.rotate, "count": self.batch, "part": self.part}
        return normalise(augment(images, random, **how))
