"""Which StyleGAN2 generator: what fixes its architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import grids

ARCHITECTURE = "stylegan2"


@dataclass(frozen=True)
class StyleGAN2Config:
    """Everything that fixes a StyleGAN2 generator. Defaults: config F at 256x256 (Karras et al. 2020), with which the paper
    compares, 30,034,338 parameters.

    Attributes:
        size: (height, width) of the image; one number for a square. The shorter side is a power of two from 8, the longer
            one a multiple of a quarter of it.
        style_dim: length of z and w.
        mapping_layers: depth of the mapping network.
        mapping_lr_mul: its learning-rate multiplier.
        width: channels of the widest layers, up to 64 pixels; 128 pixels have half as many, 256 a quarter, ...
    """

    size: tuple[int, int] = (256, 256)
    style_dim: int = 512
    mapping_layers: int = 8
    mapping_lr_mul: float = 0.01
    width: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", grids.as_size(self.size))
        for name in ("style_dim", "mapping_layers", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        shorter, longer = sorted(self.size)
        if shorter < 8 or shorter & (shorter - 1) or longer % (shorter // 4):
            expected = "a power of two of at least 8 and beside it a multiple of a quarter of it"
            raise ValueError(f"size: expected {expected}, got {self.size[0]}x{self.size[1]}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the activations, from the constant's, 4 pixels on the shorter side, to the image's."""
        doublings = min(self.size).bit_length() - 3
        return tuple((self.size[0] >> n, self.size[1] >> n) for n in range(doublings, -1, -1))

    def channels(self, size: tuple[int, int]) -> int:
        """Channels of the activations of a (height, width)."""
        return max(min(self.width, 64 * self.width // min(size)), 1)

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Output channels of each 3x3 convolution: one at the constant's size, two at every other."""
        first, *others = (self.channels(size) for size in self.sizes)
        return (first, *(width for width in others for _ in range(2)))

    @property
    def rgb_layers(self) -> tuple[int, ...]:
        """Convolutions (from 0) after which a ToRGB adds to the image: the last of every size."""
        return tuple(range(0, len(self.layer_widths), 2))

    def flops(self) -> int:
        """Multiplications and additions of convolutions and ToRGBs, forward, for one image.

        A convolution that doubles the size is a transposed one, which multiplies once for each pixel that it reads. To
        count it for each pixel that it writes, as is often done (83.7 G products at 256x256), is to count zeros.
        """
        products, entered = 0, self.channels(self.sizes[0])
        for k, (height, width) in enumerate(self.sizes):
            pixels, channels = height * width, self.channels((height, width))
            products += 9 * channels * channels * pixels + 3 * channels * pixels
            products += 9 * entered * channels * pixels // 4 if k else 0
            entered = channels
        return 2 * products

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"architecture": ARCHITECTURE, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StyleGAN2Config:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another architecture, a field that this version does not know, or a value out of range.
        """
        values = dict(values)
        came = values.pop("architecture", None)
        if came != ARCHITECTURE:
            raise ValueError(f"generator config: expected architecture {ARCHITECTURE!r}, got {came!r}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"generator config: unknown fields {', '.join(unknown)}")
        return cls(**values)
