"""The CIPS generator: every pixel computed from its coordinates and a style, by one stack of modulated
layers.

    w = mapping(z)        PixelNorm, 8 x EqualLinear with leaky ReLU
    e = [sin(B (x, y) + b), table(x, y)]
    rgb = stack(e, w)     15 modulated fully-connected layers; every second one adds to the RGB sum, or, with
                          residual blocks of two layers, the last alone

(CIPS section 3 and supplement section 1.) The stack is `cips_kernels.FusedModFCStack`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cips_kernels import FusedModFCStack

from . import grids, official
from .config import GeneratorConfig, presets
from .encodings import CoordinateEncoding
from .mapping import MappedGenerator, describe


class Generator(MappedGenerator):
    """Images from latent vectors, at any coordinates.

    Args:
        config: the architecture, or the name of a preset.
        dtype: of the encodings and the stack (torch.bfloat16, torch.float16); None: autocast's where it is
            on, otherwise the parameters'. The parameters stay float32, the mapping network and the RGB sum
            are computed in it.
        backend: of the stack, see `cips_kernels.backends()`.
        save: what a backward finds kept of the stack, "all", "some" or "none"; with "none" not even the encoding
            is there as a whole. See `cips_kernels.functional.modfc_stack`.

    Attributes:
        w_mean: `[style_dim]`, the mean w for truncation: a running mean of the training batches, or what
            `estimate_w_mean` found; kept in the state dict.
    """

    def __init__(
        self,
        config: GeneratorConfig | str = "paper",
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        save: str = "all",
    ) -> None:
        if isinstance(config, str):
            if config not in presets:
                raise ValueError(
                    f"config: expected a GeneratorConfig or one of {', '.join(presets)}, got {config!r}"
                )
            config = presets[config]
        if not isinstance(config, GeneratorConfig):
            raise TypeError(f"config: expected a GeneratorConfig, got {type(config).__name__}; see cips.make_generator")
        # styles in W+: one for every layer, then one for every ToRGB
        n_styles = len(config.layer_widths) + len(config.rgb_layers)
        super().__init__(config.style_dim, config.mapping_layers, config.mapping_lr_mul, n_styles, dtype)
        self.config = config
        self.encoding = CoordinateEncoding(
            config.fourier_features,
            config.table_features,
            config.table_size or config.size,
            config.table_init_std,
            config.fourier_bias,
        )
        self.synthesis = FusedModFCStack(
            [self.encoding.features, *config.layer_widths],
            config.style_dim,
            rgb_after=list(config.rgb_layers),
            blocks=config.blocks,
            activation=config.activation,
            backend=backend,
            save=save,
        )

    def forward(
        self,
        z: Tensor,
        coords: Tensor | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        per_image: bool = False,
        input_is_w: bool = False,
        truncation: float = 1.0,
        noise: str | int | Tensor = "fresh",
        lookup: str = "exact",
        blend: Tensor | None = None,
    ) -> Tensor:
        """Synthesise images or single pixels.

        Args:
            z: `[B, style_dim]` ~ N(0, 1); with `input_is_w` w `[B, style_dim]`, or W+ `[B, n_styles,
                style_dim]`.
            coords: points (x, y) in [-1, 1]: `[P, 2]` or a grid `[H, W, 2]`, the same for all images, or a
                grid an image, `[B, H, W, 2]`. None: the full grid of `size`.
            size: (height, width) of the full grid where `coords` is None; None: the config's size.
            per_image: `coords` has a leading B although it has three dimensions: `[B, P, 2]`.
            input_is_w: `z` is w already.
            truncation: w becomes w_mean + truncation * (w - w_mean); 1 leaves it.
            noise: "fresh" (a new seed a call, from torch's generator of the device), "off", an int seed (the
                same point gets the same noise on any grid), or a tensor `[L, B, P]` or `[L, B, H, W]`.
            lookup: how the table is read, "exact" or "compat" (see `encodings.CoordinateTable`).
            blend: gives every pixel a style of its own, as a panorama has that goes over from one latent to the
                next: `z` is then `[B, K, style_dim]` (W+ `[B, K, n_styles, style_dim]`), and `blend` has the K
                weights of each point, `[P, K]` or, for a grid, `[H, W, K]`, for all images or with a leading B.
                Where they add up to one, it is w that is blended.

        Returns:
            float32 (float64 for float64 parameters), nominally in [-1, 1] and not clipped: `[B, 3, H, W]` for
            a grid, `[B, P, 3]` for points. A grid's memory format is channels-last.
        """
        blended = blend is not None
        w = self.styles(z, input_is_w=input_is_w, truncation=truncation, blended=blended)
        points, shape = self.points(coords, size, per_image, w)
        weights = _pixel_weights(blend, shape, w) if blended else None
        autocast = w.device.type if torch.amp.is_autocast_available(w.device.type) else "cpu"
        dtype = self.compute_dtype(autocast)
        with torch.autocast(autocast, enabled=False):
            full = None if points is not None else shape
            x = self.encoding.at(points, size=full, lookup=lookup, dtype=dtype)
            rgb = self.synthesis(x, w, stack_noise(noise, w.device), blend=weights, layout="bpc")
        if len(shape) == 1:
            return rgb
        return rgb.unflatten(1, shape).permute(0, 3, 1, 2)

    @classmethod
    def from_official(
        cls,
        state_dict_or_path: str | os.PathLike[str] | Mapping[str, Any],
        *,
        which: str | None = None,
        size: int | tuple[int, int] | None = None,
        mapping_lr_mul: float = 0.01,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> Generator:
        """The generator of a checkpoint of the official code, `CIPSskip` or `CIPSres`, in eval mode on the CPU.

        Its images are the official ones in eval mode with `lookup="compat"`; `lookup="exact"` reads the table as the
        official code does in training. The official files hold no mean w: it is estimated, as `estimate_w_mean` does.

        Args:
            state_dict_or_path: a `.pt` file, or what it holds: a bare state dict, or a training checkpoint's dict of
                several. Keys may begin with `module.`.
            which: of several state dicts the one to take; None: `g_ema`, or else `g`.
            size: (height, width) of the image where it is not the table's: 1024 for the released `ffhq1024`, whose
                table is 256x256.
            mapping_lr_mul: `lr_mlp` of the official class, which no file tells.
            activation: "sin" or "sinrelu" for a class with a sine: its files tell that it is one, not which.
            dtype, backend: as in `Generator`.

        Parameters are float64 for a float64 state dict, otherwise float32.

        Raises:
            UsageError: no such file, a damaged one or one that would run code, another kind of checkpoint, a sine and no
                word which, a key missing, extra or misshapen; naming the file and the key.
            TypeError, ValueError: an argument of another kind, named.
        """
        name, state = official.read_official(state_dict_or_path, which, official.GENERATORS)
        config = official.official_generator_config(name, state, size, mapping_lr_mul, activation)
        parameters = {entry.parameter: entry.to_parameter(state[entry.key]) for entry in official.entries(config)}
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            generator = cls(config, dtype=dtype, backend=backend)
        generator.to_empty(device="cpu").to(parameters["encoding.table.weight"].dtype)
        generator.load_state_dict({**parameters, "w_mean": generator.w_mean})
        generator.estimate_w_mean()
        return generator.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The state dict of the official class with these parameters, copied: the inverse of `from_official`, bit for
        bit and in the official order. The image's size and `w_mean` have no place in it.

        Raises:
            ValueError: the official classes have no such architecture; names the config's field.
        """
        state = self.state_dict()
        return {entry.key: entry.to_official(state[entry.parameter]) for entry in official.entries(self.config)}

    def points(
        self, coords: Tensor | None, size: int | tuple[int, int] | None, per_image: bool, w: Tensor
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """Coordinates as `[P, 2]` or `[B, P, 2]`, None for the full grid; the shape of the result's pixels."""
        if coords is None:
            return None, self.config.size if size is None else grids.as_size(size)
        if size is not None:
            raise ValueError(f"size: expected None where coords are given, got {size!r}")
        if not isinstance(coords, Tensor) or not coords.is_floating_point():
            raise TypeError(f"coords: expected a floating-point tensor [..., 2], got {describe(coords)}")
        if coords.device != w.device:
            raise ValueError(
                f"coords: is on {coords.device} but the generator is on {w.device}; move both to one device"
            )
        if coords.shape[-1:] != (2,) or coords.dim() not in ((3, 4) if per_image else (2, 3, 4)):
            expected = "[B, P, 2] or [B, H, W, 2]" if per_image else "[P, 2], [H, W, 2] or [B, H, W, 2]"
            raise ValueError(f"coords: expected {expected}, got {describe(coords)}")
        each = per_image or coords.dim() == 4
        if each and len(coords) != len(w):
            raise ValueError(f"coords: expected one set for each of {len(w)} images, got {describe(coords)}")
        shape = tuple(coords.shape[1:-1] if each else coords.shape[:-1])
        return (coords.flatten(1, -2) if each else coords.flatten(0, -2)).float(), shape

def stack_noise(noise: str | int | Tensor, device: torch.device) -> str | int | Tensor:
    """A generator's noise argument as its stack takes it."""
    if isinstance(noise, str):
        if noise not in ("fresh", "off"):
            raise ValueError(f"noise: expected 'fresh', 'off', an int seed or a tensor, got {noise!r}")
        # drawn on the device from torch's own generator: no synchronisation, and a saved RNG state replays it
        return noise if noise == "off" else torch.randint(2**63 - 1, (), device=device)
    return noise.flatten(2) if isinstance(noise, Tensor) and noise.dim() == 4 else noise


def _pixel_weights(blend: Tensor, shape: tuple[int, ...], w: Tensor) -> Tensor:
    """The weights of the styles `w` `[B, K, ...]` at points of `shape`, as the stack takes them: `[P, K]` or `[B, P,
    K]`."""
    batch, count = w.shape[:2]
    forms = ((*shape, count), (batch, *shape, count))
    if not isinstance(blend, Tensor) or not blend.is_floating_point():
        raise TypeError(f"blend: expected a floating-point tensor {list(forms[0])}, got {describe(blend)}")
    if tuple(blend.shape) not in forms:
        raise ValueError(f"blend: expected {list(forms[0])} or {list(forms[1])}, got {describe(blend)}")
    if blend.device != w.device:
        raise ValueError(f"blend: is on {blend.device} but the generator is on {w.device}; move both to one device")
    return blend.flatten(0, -2) if blend.dim() == len(forms[0]) else blend.flatten(1, -2)
