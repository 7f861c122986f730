"""Training for panoramas: crops of a cylinder, and real images as they are (CIPS section 4.8).

"We uniformly sample a 256x256 crop from the cylindrical coordinate grid and train the generator to produce images using
these coordinate crops as inputs", with no real panoramas. The grid is `cips.grids.cylinder` with wrap "ring": the cylinder
laid flat, closed where a turn is complete. A crop has its full height; its first column is uniform over the turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UsageError
from ...grids import cylinder
from .regime import Regime, Sight


class Cylinder(Regime):
    """Every generated image is a crop of the cylinder; every real one is seen whole.

    Args:
        size: (height, width) of the images: the cylinder's height, and a crop's width.
        turn: columns of a full turn, at least `width`.
        device: that trains.

    Raises:
        UsageError: a turn narrower than an image.
    """

    def __init__(self, size: tuple[int, int], turn: int, device: torch.device | str = "cpu") -> None:
        super().__init__(size, size, device)
        if turn < size[1]:
            raise UsageError(f"turn: expected at least the image's width of {size[1]} columns, got {turn}")
        self.turn = turn
        self.grid = cylinder(size[0], turn, wrap="ring", device=device)
        self._columns = torch.arange(size[1], device=device)

    def __call__(self, real: Tensor) -> Sight:
        first = torch.randint(self.turn, (len(real), 1), device=self.device)
        columns = (first + self._columns) % self.turn
        return Sight(real, self.grid[:, columns].transpose(0, 1).contiguous())

    def shown(self) -> Tensor:
        """The first image's width of the turn."""
        return self.grid[:, : self.size[1]].contiguous()
