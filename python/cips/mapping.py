"""What every generator with a mapping network shares: from z to a truncated w, and the mean w."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import EqualLinear, PixelNorm

W_MEAN_DECAY = 0.998  # per training batch, as StyleGAN2 tracks its mean w


class MappedGenerator(nn.Module):
    """The first half of a generator: PixelNorm, then equalised linear layers with leaky ReLU.

    Args:
        style_dim: length of z and w.
        layers: depth of the mapping network.
        lr_mul: its learning-rate multiplier.
        n_styles: styles in W+.
        dtype: of the second half (torch.bfloat16, torch.float16); None: autocast's where it is on, otherwise the
            parameters'.

    Attributes:
        w_mean: `[style_dim]`, the mean w for truncation: a running mean of the training batches, or what
            `estimate_w_mean` found; kept in the state dict.
    """

    w_mean: Tensor

    def __init__(self, style_dim: int, layers: int, lr_mul: float, n_styles: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.style_dim, self.n_styles, self.dtype = style_dim, n_styles, dtype
        linear = (EqualLinear(style_dim, style_dim, lr_mul=lr_mul, activation="lrelu") for _ in range(layers))
        self.mapping = nn.Sequential(PixelNorm(), *linear)
        self.register_buffer("w_mean", torch.zeros(style_dim))

    def styles(
        self, z: Tensor, *, input_is_w: bool = False, truncation: float = 1.0, blended: bool = False
    ) -> Tensor:
        """Truncated w, from the arguments of `forward`; `blended`: K for each image."""
        dim, parameter = self.style_dim, self.w_mean
        many = "B, K" if blended else "B"
        wanted = f"[{many}, {dim}]" + (f" or [{many}, {self.n_styles}, {dim}]" if input_is_w else "")
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z: expected a floating-point tensor {wanted}, got {describe(z)}")
        rank = 3 if blended else 2
        in_w_plus = input_is_w and z.dim() == rank + 1 and z.shape[-2] == self.n_styles
        if not (z.dim() == rank or in_w_plus) or z.shape[-1] != dim:
            raise ValueError(f"z: expected {wanted}, got {describe(z)}")
        if blended:
            w = self.styles(z.flatten(0, 1), input_is_w=input_is_w, truncation=truncation)
            return w.unflatten(0, z.shape[:2])
        if z.device != parameter.device:
            raise ValueError(
                f"z: is on {z.device} but the generator is on {parameter.device}; move both to one device"
            )
        w = z.to(parameter.dtype)
        if not input_is_w:
            with torch.autocast(z.device.type, enabled=False):
                w = self.mapping(w)
            if self.training and len(w):
                with torch.no_grad():
                    self.w_mean.lerp_(w.mean(0), 1 - W_MEAN_DECAY)
        if truncation != 1.0:
            w = torch.lerp(self.w_mean.clone(), w, float(truncation))
        return w

    @torch.no_grad()
    def estimate_w_mean(self, samples: int = 10_000, seed: int = 0) -> Tensor:
        """Sets `w_mean` to the mean w of `samples` latents drawn from `seed`, and returns it."""
        if samples < 1:
            raise ValueError(f"samples: expected an integer of at least 1, got {samples!r}")
        random = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(self.w_mean)
        for start in range(0, samples, 1000):
            count = min(1000, samples - start)
            z = torch.randn(count, self.style_dim, generator=random)
            total += self.mapping(z.to(total)).sum(0)
        return self.w_mean.copy_(total / samples)

    def compute_dtype(self, device_type: str) -> torch.dtype:
        """Of what comes behind the mapping network in a call made now: see `dtype`."""
        if self.dtype is not None:
            return self.dtype
        if torch.is_autocast_enabled(device_type) and self.w_mean.dtype != torch.float64:
            return torch.get_autocast_dtype(device_type)
        return self.w_mean.dtype


def describe(value: object) -> str:
    """What came: dtype, shape and device of a tensor, or the value itself."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"
