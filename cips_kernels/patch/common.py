"""What the replacements of every code base share."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn


class FusedMixin:
    """Stands before a foreign class and answers in its place."""

    is_rgb = False
    original: type[nn.Module]
    cips_kernels_backend: str

    @classmethod
    @lru_cache(maxsize=256)
    def over(cls, original: type[nn.Module]) -> type[nn.Module]:
        """The subclass of `original` with this class's forward; the same at every call."""
        return type(f"Fused{original.__name__}", (cls, original), {"original": original})


def one_by_one(weight: Tensor) -> Tensor:
    """`[O, I]` of a 1x1 convolution's weight `[O, I, 1, 1]` or `[1, O, I, 1, 1]`."""
    return weight.reshape(weight.shape[-4], weight.shape[-3])


def fresh_seed(x: Tensor) -> Tensor:
    """A noise seed from PyTorch's generator of the device."""
    return torch.randint(2**63 - 1, (), device=x.device)


def pixel_noise(noise: Tensor, x: Tensor) -> Tensor:
    """`[B, P]` of a noise image `[B or 1, 1, H, W]` or `[H, W]`."""
    noise = noise.reshape(-1, x.shape[2] * x.shape[3])
    return noise.expand(x.shape[0], -1).to(torch.promote_types(noise.dtype, torch.float32))


def same(a: float, b: float) -> bool:
    """Whether two factors are one, written down twice."""
    return abs(a - b) <= 1e-6 * abs(b)
