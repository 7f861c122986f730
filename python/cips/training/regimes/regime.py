"""What a training regime is: which points of an image are generated, and what of a real one is seen beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """What a step looks at. Slices of it are parts of the batch.

    Attributes:
        real: of the real images, `[B, 3, h, w]`.
        coords: the points of the generated ones, float32 `[B, h, w, 2]`, an image's own, the same for the
            discriminator's and the generator's half of a step; None: the full grid.
    """

    real: Tensor
    coords: Tensor | None = None

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, part: slice) -> Sight:
        return Sight(self.real[part], None if self.coords is None else self.coords[part])


class Regime(ABC):
    """Decides, step by step, what the discriminator looks at.

    Attributes:
        size: (height, width) of the whole image.
        seen: (height, width) of what the discriminator sees.
    """

    def __init__(self, size: tuple[int, int], seen: tuple[int, int], device: torch.device | str) -> None:
        self.size, self.seen, self.device = size, seen, torch.device(device)

    @abstractmethod
    def __call__(self, real: Tensor) -> Sight:
        """What a step generates, and what it sees of the real images `[B, 3, height, width]` of `size`.

        Random choices come from torch's global generator of the device, as latents do: they are part of a saved state,
        differ between processes of different seeds, and can be replayed in a CUDA graph. The host never waits.
        """

    def shown(self) -> Tensor | None:
        """Points `[H, W, 2]` that sample pictures show; None: the whole image."""
        return None


class FullImage(Regime):
    """The whole image, on the table's own grid: nothing is gathered."""

    def __init__(self, size: tuple[int, int], device: torch.device | str) -> None:
        super().__init__(size, size, device)

    def __call__(self, real: Tensor) -> Sight:
        return Sight(real)


def random_below(limits: Tensor, count: int) -> Tensor:
    """Integers from 0 to below `limits` `[K]`, equally likely, int64 `[count, K]`, drawn on the device of `limits`.

    `torch.randint` takes its limit from the host only. Like it, this divides a random word by the limit; the word has 62
    bits, so that no value is likelier than another by more than 2^-40 for limits that images have.
    """
    return torch.randint(2**62, (count, len(limits)), device=limits.device) % limits
