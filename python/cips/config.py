"""Which generator and discriminator: everything that fixes an architecture, and the generators that have a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import grids
from .stylegan2_config import StyleGAN2Config

GENERATOR_ACTIVATIONS = ("lrelu", "sin", "sinrelu")


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that fixes a generator's architecture. Defaults: the paper's at 256x256, 45,911,076
    parameters.

    Attributes:
        size: (height, width) of the image whose pixels span [-1, 1]; one number for a square.
        style_dim: length of z and w.
        mapping_layers: depth of the mapping network.
        mapping_lr_mul: its learning-rate multiplier.
        fourier_features: number of Fourier features; 0: none.
        fourier_bias: whether they have a bias: the official code's do, those of the paper's formula do not.
        table_features: length of a coordinate embedding; 0: none. One of the two is there.
        table_size: (rows, columns) of the table of embeddings; None: `size`.
        table_init_std: standard deviation with which the table starts; officially 1.
        width: channels of every modulated layer.
        n_layers: number of modulated layers.
        widths: channels of each modulated layer, instead of `width` and `n_layers`.
        rgb_after: layers (from 0, or from the last as -1) after which a ToRGB adds to the image; None: every second
            layer, the last included, or with `residual` the last alone.
        residual: residual blocks of two layers behind the first layer (the official `CIPSres`), each `(conv2(
            conv1(x)) + skip(x)) / sqrt(2)`; the number of layers is odd then.
        activation: of every modulated layer: "lrelu" (slope 0.2, gain sqrt 2), or the official code's "sin" (no gain) or
            "sinrelu" (even channels leaky ReLUs, odd ones sines, gain sqrt 2).
    """

    size: tuple[int, int] = (256, 256)
    style_dim: int = 512
    mapping_layers: int = 8
    mapping_lr_mul: float = 0.01
    fourier_features: int = 512
    table_features: int = 512
    table_size: tuple[int, int] | None = None
    table_init_std: float = 1.0
    width: int = 512
    n_layers: int = 15
    widths: tuple[int, ...] | None = None
    rgb_after: tuple[int, ...] | None = None
    residual: bool = False
    activation: str = "lrelu"
    fourier_bias: bool = True

    def __post_init__(self) -> None:
        put = object.__setattr__  # the fields are frozen; lists, as JSON gives them, become tuples
        put(self, "size", grids.as_size(self.size))
        if self.table_size is not None:
            put(self, "table_size", grids.as_size(self.table_size, "table_size"))
        for name in ("style_dim", "mapping_layers", "fourier_features", "table_features", "width", "n_layers"):
            value, low = getattr(self, name), 0 if name in ("fourier_features", "table_features") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
        if not self.fourier_features + self.table_features:
            raise ValueError("fourier_features, table_features: expected at least one above 0, got 0 and 0")
        if self.widths is not None:
            put(self, "widths", tuple(self.widths))
            if not self.widths or not all(isinstance(n, int) and n >= 1 for n in self.widths):
                raise ValueError(f"widths: expected integers of at least 1, one a layer, got {self.widths!r}")
        if self.rgb_after is not None:
            put(self, "rgb_after", tuple(self.rgb_after))
            depth = len(self.layer_widths)
            if not self.rgb_after or not all(-depth <= n < depth for n in self.rgb_after):
                raise ValueError(f"rgb_after: expected layers from 0 to {depth - 1}, got {self.rgb_after}")
        if self.activation not in GENERATOR_ACTIVATIONS:
            raise ValueError(f"activation: expected {', '.join(GENERATOR_ACTIVATIONS)}, got {self.activation!r}")
        for name in ("residual", "fourier_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.residual and len(self.layer_widths) % 2 == 0:
            raise ValueError(
                "residual: expected one layer and then blocks of two, an odd number of layers, got"
                f" {len(self.layer_widths)}"
            )

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Output channels of each modulated layer."""
        return self.widths or (self.width,) * self.n_layers

    @property
    def rgb_layers(self) -> tuple[int, ...]:
        """Layers (from 0) after which a ToRGB adds to the image."""
        depth = len(self.layer_widths)
        if self.rgb_after:
            return tuple(n % depth for n in self.rgb_after)
        return (depth - 1,) if self.residual else tuple(range(depth - 1, 0, -2))[::-1] or (depth - 1,)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(first, last) layer of each residual block; none without `residual`."""
        return tuple((k, k + 1) for k in range(1, len(self.layer_widths), 2)) if self.residual else ()

    def flops(self, pixels: int | None = None) -> int:
        """Multiplications and additions of the stack, forward, for one image (or for `pixels` points)."""
        pixels = self.size[0] * self.size[1] if pixels is None else pixels
        widths = (self.fourier_features + self.table_features, *self.layer_widths)
        products = sum(i * o for i, o in zip(widths, widths[1:])) + sum(
            3 * widths[k + 1] for k in self.rgb_layers
        )
        ends = ((widths[first], widths[last + 1]) for first, last in self.blocks)
        products += sum(i * o for i, o in ends if i != o)
        return 2 * products * pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field that this version does not know, or a value out of range.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"generator config: unknown fields {', '.join(unknown)}")
        return cls(**values)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Everything that fixes a discriminator's architecture.

    Attributes:
        size: of its images: a power of two from 8, or (height, width) whose shorter side is one and whose longer side
            is a multiple of a quarter of it, as in (256, 320) or (512, 256). The shorter side is halved down to 4.
        in_channels: 3 for RGB.
        width: multiplier w on the channels, min(512, w 32768 / resolution), the shorter side's; 1 is StyleGAN2's:
            512 up to 64 pixels, then 256, 128, ...
    """

    size: int | tuple[int, int] = 256
    in_channels: int = 3
    width: float = 1.0

    def __post_init__(self) -> None:
        height, width = (self.size, self.size) if isinstance(self.size, int) else grids.as_size(self.size)
        shorter, longer = sorted((height, width))
        shown = height if height == width else (height, width)
        if shorter < 8 or shorter & (shorter - 1):
            among = "" if height == width else " as the shorter side"
            raise ValueError(f"size: expected a power of two of at least 8{among}, got {shown}")
        if longer % (shorter // 4):
            raise ValueError(
                f"size: expected a longer side that is a multiple of {shorter // 4}, a quarter of the shorter one, "
                f"got {shown}"
            )
        object.__setattr__(self, "size", shown)
        if self.in_channels < 1:
            raise ValueError(f"in_channels: expected an integer of at least 1, got {self.in_channels!r}")
        if not self.width > 0:
            raise ValueError(f"width: expected a factor above 0, got {self.width!r}")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Shorter side of the activations, from the images' down to 4."""
        shorter = min(grids.as_size(self.size))
        return tuple(shorter >> n for n in range(shorter.bit_length() - 2))

    @property
    def last_pixels(self) -> int:
        """Pixels of the last activations, 16 for a square."""
        height, width = grids.as_size(self.size)
        return 16 * max(height, width) // min(height, width)

    def channels(self, resolution: int) -> int:
        """Channels of the activations whose shorter side is `resolution`."""
        return max(min(512, round(self.width * 32768 / resolution)), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiscriminatorConfig:
        """The inverse of `to_dict`."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"discriminator config: unknown fields {', '.join(unknown)}")
        return cls(**values)


_OFFICIAL_FIXED = 4  # blocks of 512 channels; the channels of those after them are times the multiplier
_OFFICIAL_SKIP = (256, 128, 64, 32, 16)
_OFFICIAL_RESIDUAL = (256, 128, 64, 64, 32)


def official_config(
    size: int, channel_multiplier: int = 2, residual: bool = False, activation: str = "lrelu"
) -> GeneratorConfig:
    """The architecture of the released classes, whose layers taper: `CIPSskip` or `CIPSres`.

    One layer and log2(size) - 1 blocks of two, 512 wide at first; the paper's text has 512 throughout (supplement section 1).

    Args:
        size: height and width of image and table, a power of two from 4 to 1024.
        channel_multiplier: of the blocks from the fifth on.
        residual: `CIPSres`.
        activation: "lrelu" (officially None), "sin" or "sinrelu". Unlike the paper's sine variant the classes keep their
            Fourier features.

    Raises:
        ValueError: a size, multiplier or activation that the classes do not have.
    """
    for name, value in (("size", size), ("channel_multiplier", channel_multiplier)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    if size & (size - 1) or not 4 <= size <= 1024:
        raise ValueError(f"size: expected a power of two from 4 to 1024, got {size}")
    tapered = _OFFICIAL_RESIDUAL if residual else _OFFICIAL_SKIP
    blocks = [512] * _OFFICIAL_FIXED + [channel_multiplier * n for n in tapered]
    widths = (512, *(width for width in blocks[: size.bit_length() - 2] for _ in range(2)))
    return GeneratorConfig(size=(size, size), residual=residual, activation=activation, **layer_fields(widths))


def layer_fields(widths: tuple[int, ...]) -> dict[str, Any]:
    """The fields that say how wide each layer is: `width` and `n_layers` where all are alike, otherwise `widths`."""
    if len(set(widths)) == 1:
        return {"width": widths[0], "n_layers": len(widths)}
    return {"widths": widths}


presets: dict[str, GeneratorConfig | StyleGAN2Config] = {
    "paper": GeneratorConfig(),
    "official": official_config(256),
    "base": GeneratorConfig(rgb_after=(-1,)),
    "ne": GeneratorConfig(table_features=0, rgb_after=(-1,)),
    "no-fourier": GeneratorConfig(fourier_features=0, rgb_after=(-1,)),
    "residual": GeneratorConfig(residual=True),
    "sine": GeneratorConfig(fourier_features=0, rgb_after=(-1,), activation="sin"),
    "stylegan2": StyleGAN2Config(),
    "small": GeneratorConfig(
        size=(64, 64),
        style_dim=128,
        mapping_layers=4,
        fourier_features=64,
        table_features=64,
        table_init_std=0.1,  # smooth after a hundred steps instead of a thousand
        width=64,
        n_layers=6,
    ),
}
"""Named configurations; the paper's are those of its table 3, 512 wide, at 256x256:

- "paper": its default generator, 7 ToRGB: 45,911,076 parameters, the paper's 45.9 M.
- "official": the released class, which tapers to 128: 44,317,092.
- "base": one ToRGB, at the end: 44,325,906. The paper counts 43.8 M and its text does not say what is left out: without
  Fourier features ("no-fourier"), with features and embeddings summed instead of side by side, with a first layer that
  is not modulated, or with a layer less it would be 43.80 M.
- "ne": base without embeddings: 10,246,674, the paper's 10.2 M.
- "no-fourier": base without Fourier features: 43,799,570.
- "residual": base in residual blocks: 44,325,906, since a skip between equal widths has no parameters.
- "sine": no-fourier with sines in place of all leaky ReLUs: 43,799,570.
- "stylegan2": the convolutional generator that the paper compares with, config F, made by `StyleGAN2` and not by
  `Generator` (`make_generator` makes either): 30,034,338, the paper's 30.0 M.

"small" trains on a CPU in minutes.
"""
