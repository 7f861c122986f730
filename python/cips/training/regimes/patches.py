"""Training on patches: memory and time follow the patch, not the image (CIPS supplement, section 2).

    P(u, v) = { G(u + i sigma, v + j sigma; z) | (i, j) in mgrid(K, K) },
    0 <= u < W - (K - 1) sigma,  0 <= v < H - (K - 1) sigma

sigma = 1 is a dense patch, sigma > 1 a dilated one that sees more of the image with gaps. Real images are cut at the same
places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UsageError
from ...grids import patches
from .regime import Regime, Sight, random_below


class Patches(Regime):
    """K x K pixels, sigma apart, at offsets that are uniform over all that lie inside; each image its own.

    Where several sigmas are given, every step draws one of them, equally likely, for the whole batch, as the official
    loader does: the discriminator's minibatch statistics then compare patches of one scale.

    Args:
        size: (height, width) of the image.
        k: rows and columns of a patch.
        sigmas: steps between its pixels to choose from.
        device: that trains.

    Raises:
        UsageError: a patch that the image has no room for.
    """

    def __init__(
        self, size: tuple[int, int], k: int, sigmas: Sequence[int] = (1,), device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(size, (k, k), device)
        check_patch(size, k, sigmas)
        self.sigmas = torch.tensor(list(sigmas), device=device)
        self._steps = torch.arange(k, device=device)
        self._size = torch.tensor(size, device=device)

    def __call__(self, real: Tensor) -> Sight:
        rows, columns = self.draw(len(real))
        image = torch.arange(len(real), device=self.device)
        # advanced indices on both sides of a slice: the slice's dimension, the channels, comes last
        seen = real[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return Sight(seen, patches(rows, columns, self.size))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of `count` patches, int64 `[count, K]` each."""
        which = torch.randint(len(self.sigmas), (1,), device=self.device)
        sigma = self.sigmas.index_select(0, which)
        corners = random_below(self._size - (len(self._steps) - 1) * sigma, count)
        return corners[:, :1] + sigma * self._steps, corners[:, 1:] + sigma * self._steps


def check_patch(size: tuple[int, int], k: int, sigmas: Sequence[int]) -> None:
    """Raise UsageError unless every patch of `k` pixels, `sigmas` apart, has a place in an image of `size`."""
    shorter = min(size)
    if k > shorter:
        raise UsageError(f"patch: expected at most the image's shorter side, {shorter} pixels, got {k}")
    for sigma in sigmas:
        reach = (k - 1) * sigma + 1
        if reach > shorter:
            raise UsageError(
                f"dilation: {k} pixels, {sigma} apart, reach over {reach}, more than the image's shorter side of {shorter}; "
                f"expected at most {(shorter - 1) // max(k - 1, 1)}"
            )
