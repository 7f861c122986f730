"""`SynthesisLayer` and `ToRGBLayer` of StyleGAN2-ADA and what grew from it (StyleNeRF, EG3D, CREPS's layers of kernel 1).

    weight [O, I, 1, 1] with no factor; eps 1e-8 beside the square sum of weight times style; clamped results
    ToRGBLayer: style = affine(w) / sqrt(I), no demodulation, bias; the caller adds the image so far
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .. import functional
from .common import FusedMixin, fresh_seed, one_by_one, pixel_noise, same

_EPS = 1e-8


def _why_not_weight(layer: nn.Module) -> str | None:
    for name in ("weight", "affine", "bias"):
        if not hasattr(layer, name):
            return f"it has no {name}"
    if layer.weight.dim() != 4:
        return f"its weight is {list(layer.weight.shape)}, not [O, I, 1, 1]"
    if layer.weight.shape[2:] != (1, 1):
        return f"its kernel is {layer.weight.shape[2]}x{layer.weight.shape[3]}, not 1x1"
    return None


def _why_not_layer(layer: nn.Module) -> str | None:
    reason = _why_not_weight(layer)
    if reason is not None:
        return reason
    if getattr(layer, "up", 1) != 1:
        return f"it goes on to sample up by {layer.up}"
    if getattr(layer, "activation", None) not in ("lrelu", "linear"):
        return f"its activation is {getattr(layer, 'activation', None)!r}, not 'lrelu' or 'linear'"
    if not hasattr(layer, "act_gain"):
        return "it has no act_gain"
    if getattr(layer, "use_noise", False) and not (hasattr(layer, "noise_strength") and hasattr(layer, "noise_const")):
        return "its noise has no noise_strength and noise_const"
    return None


def _why_not_rgb(layer: nn.Module) -> str | None:
    reason = _why_not_weight(layer)
    if reason is None and not same(getattr(layer, "weight_gain", 0.0), 1 / math.sqrt(layer.weight.shape[1])):
        return f"its weight_gain is {getattr(layer, 'weight_gain', None)}, not 1 / sqrt({layer.weight.shape[1]})"
    return reason


def _clamped(x: Tensor, clamp: float | None) -> Tensor:
    return x if clamp is None else x.clamp(-clamp, clamp)


class _Layer(FusedMixin):
    def forward(
        self, x: Tensor, w: Tensor, noise_mode: str = "random", fused_modconv: bool = True, gain: float = 1
    ) -> Tensor:
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode: expected random, const or none, got {noise_mode!r}")
        values = None
        if getattr(self, "use_noise", False) and noise_mode != "none":
            values = fresh_seed(x) if noise_mode == "random" else pixel_noise(self.noise_const, x)
        y = functional.modfc(
            x,
            one_by_one(self.weight),
            self.affine(w),
            self.bias,
            values,
            None if values is None else self.noise_strength,
            activation=self.activation,
            gain=self.act_gain * gain,
            eps=_EPS / self.weight.shape[1],  # ours stands beside a square sum that is smaller by the factor I
            layout="bchw",
            backend=self.cips_kernels_backend,
        )
        clamp = getattr(self, "conv_clamp", None)
        return _clamped(y, None if clamp is None else clamp * gain)


class _ToRGB(FusedMixin):
    is_rgb = True

    def forward(self, x: Tensor, w: Tensor, fused_modconv: bool = True) -> Tensor:
        rgb = functional.to_rgb(
            x, one_by_one(self.weight), self.affine(w), self.bias, layout="bchw", backend=self.cips_kernels_backend
        )
        return _clamped(rgb.to(x.dtype), getattr(self, "conv_clamp", None))


LAYERS = {"SynthesisLayer": (_Layer, _why_not_layer), "ToRGBLayer": (_ToRGB, _why_not_rgb)}
