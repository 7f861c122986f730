"""StyleGAN2's residual discriminator (Karras et al. 2020), as CIPS uses it unchanged.

x = 1x1 from RGB
every block:  x = (down(conv2(conv1(x))) + down(skip(x))) / sqrt(2)       down: blur [1,3,3,1], then stride 2
4x4: minibatch standard deviation, conv, two linear layers, one logit
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cips_kernels import filters

from . import official_discriminator
from .config import DiscriminatorConfig
from .convolution import conv2d
from .grids import as_size
from .layers import NEGATIVE_SLOPE, EqualConv2d, EqualLinear
from .official import read_official

BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)
STDDEV_GROUP = 4


class Blur(nn.Module):
    """Low-pass filter [1,3,3,1] x [1,3,3,1] / 64, twice differentiable.

    One pass of our own kernel for channels-last tensors on a GPU (`cips_kernels.filters`), elsewhere a depthwise
    convolution, which is the fastest that PyTorch has on a CPU.

    Args:
        padding: zeros on every side.
        stride: of the result.
    """

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        taps = torch.tensor(BLUR_TAPS)
        kernel = taps[:, None] * taps
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, C, H', W']` with H' = (H + 2 padding - 4) // stride + 1."""
        if filters.serves(x):
            return filters.blur(x, padding=self.padding, stride=self.stride)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        return conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)

    def extra_repr(self) -> str:
        return f"padding={self.padding}, stride={self.stride}"


class ResidualBlock(nn.Module):
    """Halves the resolution: `[B, in, H, W]` -> `[B, out, H/2, W/2]`.

    The sum's 1/sqrt(2) is multiplied into both branches' weights. The skip's 1x1 convolution would read every
    second blurred pixel only, so the blur computes just those.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = math.sqrt(0.5)
        self.conv1 = EqualConv2d(in_channels, in_channels, 3, padding=1)
        self.blur = Blur(padding=2)
        self.conv2 = EqualConv2d(in_channels, out_channels, 3, stride=2, gain=half)
        self.skip_blur = Blur(padding=1, stride=2)
        self.skip = EqualConv2d(in_channels, out_channels, 1, bias=False, activation="linear", gain=half)

    def forward(self, x: Tensor) -> Tensor:
        if filters.serves(x):
            # bias, activation and filter in one pass over conv1's result
            product, blur = self.conv1.product(x), self.blur
            bias = self.conv1.scaled_bias()
            y = filters.blur(
                product, bias, padding=blur.padding, stride=blur.stride, negative_slope=NEGATIVE_SLOPE
            )
        else:
            y = self.blur(self.conv1(x))
        return self.conv2(y, self.skip(self.skip_blur(x)))


def stddev_group(batch: int, group: int = STDDEV_GROUP) -> int:
    """Images a group in `minibatch_stddev`: the largest number up to `group` that divides `batch`."""
    return next((n for n in range(min(group, batch), 0, -1) if batch % n == 0), 1)


def minibatch_stddev(x: Tensor, group: int = STDDEV_GROUP) -> Tensor:
    """Appends one channel: the standard deviation over groups of images, averaged over channels and pixels.

    Args:
        x: `[B, C, H, W]`. Group m holds the images m, m + B/group, m + 2 B/group, ...
        group: images a group; where it does not divide B, the largest smaller number that does.

    Returns:
        `[B, C + 1, H, W]`.
    """
    batch, _, height, width = x.shape
    group = stddev_group(batch, group)
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).unflatten(0, (group, batch // group))
    deviation = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).to(x.dtype)
    return torch.cat((x, deviation.repeat(group).view(batch, 1, 1, 1).expand(-1, 1, height, width)), 1)


class Discriminator(nn.Module):
    """One logit an image: high for real ones.

    Args:
        config: the architecture, or the size of square images.
        dtype: of the convolutions down to 4x4 pixels (torch.bfloat16); None: autocast's where it is on,
            otherwise the parameters'. Parameters stay float32 and everything from 4x4 pixels on is computed
            in float32.

    On a GPU activations are channels-last, for which the matrix units and our filters are made; elsewhere they are
    where the images are. `discriminator.to(memory_format=torch.channels_last)` keeps the weights so, too, which saves
    turning them in every call.
    """

    def __init__(self, config: DiscriminatorConfig | int = 256, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        config = DiscriminatorConfig(size=config) if isinstance(config, int) else config
        self.config, self.dtype = config, dtype
        sizes = config.resolutions
        self.from_rgb = EqualConv2d(config.in_channels, config.channels(sizes[0]), 1)
        self.blocks = nn.ModuleList(
            ResidualBlock(config.channels(high), config.channels(low)) for high, low in zip(sizes, sizes[1:])
        )
        last = config.channels(4)
        self.final_conv = EqualConv2d(last + 1, last, 3, padding=1)
        self.final_linear = nn.Sequential(
            EqualLinear(last * config.last_pixels, last, activation="lrelu"),
            EqualLinear(last, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """`images` `[B, in_channels, height, width]`, nominally in [-1, 1] -> float32 (float64) logits `[B]`."""
        config, wide = self.config, self.from_rgb.weight.dtype
        height, width = as_size(config.size)
        if images.dim() != 4 or images.shape[1:] != (config.in_channels, height, width):
            wanted = f"[B, {config.in_channels}, {height}, {width}]"
            raise ValueError(f"images: expected {wanted}, got {list(images.shape)}")
        device = images.device.type
        dtype = self.dtype or (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
        )
        with torch.autocast(device, enabled=False):
            form = torch.channels_last if images.is_cuda else torch.preserve_format
            x = self.from_rgb(images.to(dtype, memory_format=form))
            for block in self.blocks:
                x = block(x)
            x = self.final_conv(minibatch_stddev(x.to(wide)))
            # the official weights count channels first, then pixels
            return self.final_linear(x.flatten(1)).squeeze(1)

    @classmethod
    def from_official(
        cls,
        state_dict_or_path: str | os.PathLike[str] | Mapping[str, Any],
        *,
        which: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Discriminator:
        """The discriminator of a checkpoint of the official code, on the CPU.

        Args:
            state_dict_or_path: a `.pt` file, or what it holds: a bare state dict, or a training checkpoint's dict of
                several. Keys may begin with `module.`.
            which: of several state dicts the one to take; None: `d`.
            dtype: as in `Discriminator`.

        Parameters are float64 for a float64 state dict, otherwise float32.

        Raises:
            UsageError: no such file, a damaged one or one that would run code, another kind of checkpoint, a key
                missing, extra or misshapen; naming the file and the key.
            TypeError: neither a path nor a state dict.
        """
        name, state = read_official(state_dict_or_path, which, official_discriminator.DISCRIMINATORS)
        config = official_discriminator.official_discriminator_config(name, state)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            discriminator = cls(config, dtype=dtype).to(state["convs.0.0.weight"].dtype)
        listed = official_discriminator.entries(config)
        discriminator.load_state_dict({parameter: state[key] for key, _, parameter in listed if parameter is not None})
        return discriminator

    def to_official(self) -> dict[str, Tensor]:
        """The state dict of the official class with these parameters, copied: the inverse of `from_official`, bit for
        bit and in the official order.

        Raises:
            ValueError: the images are not square, which the official class cannot be.
        """
        state = self.state_dict()
        kernel = official_discriminator.blur_kernel(self.from_rgb.weight.dtype).to(self.from_rgb.weight.device)
        return {
            key: (kernel if parameter is None else state[parameter]).clone(memory_format=torch.contiguous_format)
            for key, _, parameter in official_discriminator.entries(self.config)
        }
