"""The modules: a modulated layer, a ToRGB, and a whole stack of them as one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .activations import resolve_activation
from .arguments import (
    autocast_on,
    check_blocks,
    check_save,
    check_scalars,
    describe,
    expect_device,
    expect_shape,
)
from .backends import check_name
from .encoding import Encoding

ModuleNoise = None | str | int | Tensor


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` in the dtype of the parameters, also under autocast: a style's rounding would be seen in every pixel."""
    if not autocast_on(x.device):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight, bias)


class EqualizedLinear(nn.Module):
    """`y = weight x / sqrt(in_features) + bias`: StyleGAN2's equalised learning rate.

    Args:
        in_features, out_features: sizes.
        bias_init: initial bias; 1 for the affine of a modulated layer, so that styles start around 1.
    """

    def __init__(self, in_features: int, out_features: int, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.scale = 1.0 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight * self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def _sizes(**named: int) -> None:
    for name, value in named.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


def _check_style(style: Tensor, affine: EqualizedLinear, *forms: str) -> None:
    """Raise unless `style` has one of the `forms` (its rank and width) and the affine's device and dtype."""
    weight = affine.weight
    if not isinstance(style, Tensor) or style.dim() not in [form.count(",") + 1 for form in forms] or style.shape[-1] != weight.shape[1]:
        expected = " or ".join(form.format(weight.shape[1]) for form in forms)
        error = ValueError if isinstance(style, Tensor) else TypeError
        raise error(f"style: expected {expected}, got {describe(style)}")
    expect_device("style", style, weight, "the module")
    cast = style.is_floating_point() and autocast_on(style.device)
    if style.dtype != weight.dtype and not cast:
        raise TypeError(f"style: expected {str(weight.dtype).removeprefix('torch.')} as the module's parameters, got {describe(style)}")


def call_noise(noise: ModuleNoise, enabled: bool, device: torch.device) -> int | Tensor | None:
    """A module's noise argument as the operators take it: fresh seeds come from PyTorch's generator of the device."""
    if isinstance(noise, str) and noise not in ("fresh", "off"):
        raise ValueError(f"noise: expected None, 'fresh', 'off', an int seed or a tensor, got {noise!r}")
    if not enabled or (isinstance(noise, str) and noise == "off"):
        return None
    if noise is None or isinstance(noise, str):
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    return noise


class FusedModFC(nn.Module):
    """A modulated, demodulated fully-connected layer with noise, bias and leaky ReLU (the ModFC of CIPS, section 3).

    A drop-in for StyleGAN2's modulated 1x1 convolution and its tail.

    Args:
        in_features, out_features: channels I and O.
        style_dim: width of the style vector.
        demodulate: normalise each row of the modulated weight.
        bias: add a learned bias.
        noise: add noise with one learned strength, which starts at 0.
        activation: "lrelu", "linear", or as in the official code "sin" or "sinrelu"; see `functional.modfc`.
        negative_slope, gain: of the activation. By default the official gain: 1 for "sin", sqrt(2) for the others.
        eps: added to the squared norm of a row.
        backend: see `cips_kernels.backends`.

    Call:
        `layer(x, style, noise=None, *, coords=None, layout=None)`; `x` `[B, I, H, W]`, `[B, P, I]` or `[B, I, P]`, `style`
        `[B, style_dim]` or `[B, P, style_dim]` a pixel; noise None or "fresh" draws a new seed, "off", an int seed, or
        `[B, P]` or `[B, 1, H, W]` values. Returns `x`'s layout with O channels. See `functional.modfc` for errors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        style_dim: int,
        *,
        demodulate: bool = True,
        bias: bool = True,
        noise: bool = True,
        activation: str = "lrelu",
        negative_slope: float = 0.2,
        gain: float | None = None,
        eps: float = 1e-8,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _sizes(in_features=in_features, out_features=out_features, style_dim=style_dim)
        gain = resolve_activation(activation, negative_slope, gain)[2]
        check_scalars(negative_slope, gain, eps)
        self.in_features, self.out_features, self.style_dim = in_features, out_features, style_dim
        self.demodulate, self.activation = demodulate, activation
        self.negative_slope, self.gain, self.eps = negative_slope, gain, eps
        self.backend = check_name(backend)
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.affine = EqualizedLinear(style_dim, in_features, bias_init=1.0)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.noise_strength = nn.Parameter(torch.zeros(())) if noise else None

    def forward(
        self,
        x: Tensor,
        style: Tensor,
        noise: ModuleNoise = None,
        *,
        coords: Tensor | None = None,
        layout: str | None = None,
    ) -> Tensor:
        _check_style(style, self.affine, "[B, {}]", "[B, P, {}]")
        values = call_noise(noise, self.noise_strength is not None, x.device)
        if isinstance(values, Tensor) and values.dim() == 4:
            rows = x.shape[2:] if isinstance(x, Tensor) and x.dim() == 4 else (None, None)
            expect_shape("noise", values, (None, 1, *rows), "[B, 1, H, W]")
            values = values.flatten(1)
        return functional.modfc(
            x,
            self.weight,
            self.affine(style),
            self.bias,
            values,
            self.noise_strength,
            demodulate=self.demodulate,
            activation=self.activation,
            negative_slope=self.negative_slope,
            gain=self.gain,
            eps=self.eps,
            layout=layout,
            coords=coords,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}, {self.out_features}, style_dim={self.style_dim}"]
        parts += [f"demodulate={self.demodulate}"] if not self.demodulate else []
        parts += ["bias=False"] if self.bias is None else []
        parts += ["noise=False"] if self.noise_strength is None else []
        parts += [f"activation={self.activation!r}"] if self.activation != "lrelu" else []
        parts += [f"negative_slope={self.negative_slope:g}, gain={self.gain:.4g}, backend={self.backend!r}"]
        return ", ".join(parts)


class FusedToRGB(nn.Module):
    """A modulated projection to RGB, not demodulated, added to a running sum.

    Args:
        in_features: channels I.
        style_dim: width of the style vector.
        out_channels: channels C of the image.
        backend: see `cips_kernels.backends`.

    Call:
        `to_rgb(x, style, skip=None, *, layout=None)` -> layout of `x` with C channels, float32 (float64 for float64).
    """

    def __init__(self, in_features: int, style_dim: int, *, out_channels: int = 3, backend: str = "auto") -> None:
        super().__init__()
        _sizes(in_features=in_features, style_dim=style_dim, out_channels=out_channels)
        self.in_features, self.style_dim, self.out_channels = in_features, style_dim, out_channels
        self.backend = check_name(backend)
        self.weight = nn.Parameter(torch.randn(out_channels, in_features))
        self.affine = EqualizedLinear(style_dim, in_features, bias_init=1.0)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None = None, *, layout: str | None = None) -> Tensor:
        _check_style(style, self.affine, "[B, {}]")
        return functional.to_rgb(
            x, self.weight, self.affine(style), self.bias, skip, layout=layout, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_channels}, style_dim={self.style_dim}, backend={self.backend!r}"


class FusedModFCStack(nn.Module):
    """The layers and RGB skips of a whole generator, run as one operator.

    Args:
        widths: `[I_0, O_0, ..., O_{L-1}]`, channels of the input and of each layer's output.
        style_dim: width of the style vector.
        rgb_after: layers (from 0) after which a ToRGB reads. By default every second layer, the last included: the
            paper's 15 layers have 7.
        out_channels: channels C of the image.
        blocks: (first, last) layer of each residual block, in order and apart: `(y_last + skip(x_first)) / sqrt(2)`
            takes the place of the last layer's output (CIPSres). Block k has a parameter `skips.<k>`, `[O, I]`, normal
            at first and used as `W / sqrt(I)`, unless it keeps the number of channels: then the skip is the identity.
        demodulate, bias, noise, activation, negative_slope, gain, eps: of every layer, as in `FusedModFC`.
        save: what a backward finds kept, "all", "some" or "none"; see `functional.modfc_stack`. Blends keep all.
        backend: see `cips_kernels.backends`.

    Call:
        `stack(x, style, noise=None, *, coords=None, skip=None, blend=None, layout=None, return_features=False)`; `x` as
        in `FusedModFC`, or batch 1 shared by all images, or an `Encoding`; `style` `[B, style_dim]`, or `[B, layers and
        ToRGBs, style_dim]`, one for each layer and then each ToRGB; given noise `[L, B, P]`.
        Returns the RGB sum (float32) in the layout of `x`, with the features in front where asked for.

        With `blend=` `[P, K]` or `[B, P, K]` every pixel has a style of its own, a blend of the image's K: `style` is
        `[B, K, style_dim]`, or `[B, K, layers and ToRGBs, style_dim]`. What is blended is the outputs of the affine
        maps; where a pixel's weights add up to one, that is the same as to blend `style`. See `functional.modfc_stack`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        style_dim: int,
        *,
        rgb_after: Sequence[int] | None = None,
        out_channels: int = 3,
        blocks: Sequence[Sequence[int]] = (),
        demodulate: bool = True,
        bias: bool = True,
        noise: bool = True,
        activation: str = "lrelu",
        negative_slope: float = 0.2,
        gain: float | None = None,
        eps: float = 1e-8,
        save: str = "all",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected the input's width and at least one layer's, got {list(widths)}")
        depth = len(widths) - 1
        if rgb_after is None:
            # back from the last layer in steps of two; the first layer has none unless it is the last
            rgb_after = list(range(depth - 1, 0, -2))[::-1] or [0]
        self.rgb_after = tuple(rgb_after)
        for k, after in enumerate(self.rgb_after):
            if not 0 <= after < depth:
                raise ValueError(f"rgb_after[{k}]: expected a layer from 0 to {depth - 1}, got {after}")
        options = dict(
            demodulate=demodulate, bias=bias, noise=noise, activation=activation, negative_slope=negative_slope, gain=gain, eps=eps
        )
        self.style_dim, self.out_channels, self.backend = style_dim, out_channels, check_name(backend)
        self.save = check_save(save)
        self.layers = nn.ModuleList(
            FusedModFC(i, o, style_dim, backend=backend, **options) for i, o in zip(widths[:-1], widths[1:])
        )
        self.to_rgbs = nn.ModuleList(
            FusedToRGB(widths[after + 1], style_dim, out_channels=out_channels, backend=backend)
            for after in self.rgb_after
        )
        self.blocks = check_blocks(blocks, depth)
        ends = {k: (widths[first], widths[last + 1]) for k, (first, last) in enumerate(self.blocks)}
        self.skips = nn.ParameterDict({str(k): torch.randn(o, i) for k, (i, o) in ends.items() if i != o})

    @property
    def skip_weights(self) -> list[Tensor | None]:
        """The matrix `[O, I]` of each block's skip, None where it is the identity."""
        return [self.skips[str(k)] if str(k) in self.skips else None for k in range(len(self.blocks))]

    def styles(self, style: Tensor) -> list[Tensor]:
        """The affine's output `[B, I]` of every layer, then of every ToRGB."""
        modules = [*self.layers, *self.to_rgbs]
        if style.dim() == 3:
            if style.shape[1] != len(modules):
                raise ValueError(
                    f"style: expected [B, {len(modules)}, {self.style_dim}], one for each layer and ToRGB, got {describe(style)}"
                )
            return [module.affine(style[:, k]) for k, module in enumerate(modules)]
        # one product for all affines: a launch each would cost more than the arithmetic
        scale = self.layers[0].affine.scale
        weight = torch.cat([module.affine.weight for module in modules])
        joined = _linear(style, weight * scale, torch.cat([module.affine.bias for module in modules]))
        return list(joined.split([module.in_features for module in modules], dim=1))

    def forward(
        self,
        x: Tensor | Encoding,
        style: Tensor,
        noise: ModuleNoise = None,
        *,
        coords: Tensor | None = None,
        skip: Tensor | None = None,
        blend: Tensor | None = None,
        layout: str | None = None,
        return_features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if blend is None:
            _check_style(style, self.layers[0].affine, "[B, {}]", "[B, layers and ToRGBs, {}]")
            styles = self.styles(style)
        else:
            _check_style(style, self.layers[0].affine, "[B, K, {}]", "[B, K, layers and ToRGBs, {}]")
            count = len(self.layers) + len(self.to_rgbs)
            if style.dim() == 4 and style.shape[2] != count:
                expected = f"[B, K, {count}, {self.style_dim}], one for each layer and ToRGB"
                raise ValueError(f"style: expected {expected}, got {describe(style)}")
            styles = [s.unflatten(0, style.shape[:2]) for s in self.styles(style.flatten(0, 1))]
        depth, first = len(self.layers), self.layers[0]
        features, rgb = functional.modfc_stack(
            x,
            [layer.weight for layer in self.layers],
            styles[:depth],
            [layer.bias for layer in self.layers],
            [layer.noise_strength for layer in self.layers],
            [rgb.weight for rgb in self.to_rgbs],
            styles[depth:],
            [rgb.bias for rgb in self.to_rgbs],
            self.rgb_after,
            skip,
            noise=call_noise(noise, first.noise_strength is not None, style.device),
            coords=coords,
            demodulate=first.demodulate,
            activation=first.activation,
            negative_slope=first.negative_slope,
            gain=first.gain,
            eps=first.eps,
            blocks=self.blocks,
            skip_weights=self.skip_weights,
            blend=blend,
            layout=layout,
            want_features=return_features or not self.rgb_after,
            save=self.save if blend is None else "all",
            backend=self.backend,
        )
        return (features, rgb) if return_features or not self.rgb_after else rgb

    def extra_repr(self) -> str:
        blocks = f", blocks={list(self.blocks)}" if self.blocks else ""
        activation = self.layers[0].activation
        blocks += f", activation={activation!r}" if activation != "lrelu" else ""
        save = f", save={self.save!r}" if self.save != "all" else ""
        return f"style_dim={self.style_dim}, rgb_after={list(self.rgb_after)}{blocks}{save}, backend={self.backend!r}"
