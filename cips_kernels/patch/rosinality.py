"""`ModulatedConv2d`, `StyledConv` and `ToRGB` of StyleGAN2 in PyTorch's words, which CIPS and its kin copy.

    weight [1, O, I, 1, 1], used times `scale` = 1 / sqrt(I); style = modulation(w); eps 1e-8 beside the scaled square sum
    StyledConv: conv, then noise (one strength, `[B, 1, H, W]` values or fresh), then bias, leaky ReLU and a factor
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .. import functional
from .common import FusedMixin, fresh_seed, one_by_one, pixel_noise, same


def _why_not_conv(conv: object) -> str | None:
    for name in ("weight", "scale", "modulation", "demodulate"):
        if not hasattr(conv, name):
            return f"its convolution has no {name}"
    weight = conv.weight
    if weight.dim() != 5 or weight.shape[0] != 1:
        return f"its weight is {list(weight.shape)}, not [1, O, I, 1, 1]"
    if weight.shape[3:] != (1, 1):
        return f"its kernel is {weight.shape[3]}x{weight.shape[4]}, not 1x1"
    for name in ("upsample", "downsample"):
        if getattr(conv, name, False):
            return f"it goes on to {name}"
    if not same(conv.scale, 1 / math.sqrt(weight.shape[2])):
        return f"its weight's factor is {conv.scale}, not 1 / sqrt({weight.shape[2]})"
    return None


def _why_not_styled(layer: nn.Module) -> str | None:
    reason = _why_not_conv(getattr(layer, "conv", None))
    if reason is not None:
        return reason
    activate = getattr(layer, "activate", None)
    if not all(hasattr(activate, name) for name in ("bias", "negative_slope", "scale")):
        return "its activation is not a leaky ReLU with bias, slope and factor"
    noise = getattr(layer, "noise", None)
    if noise is not None and getattr(getattr(noise, "weight", None), "numel", lambda: 0)() != 1:
        return "its noise has not one strength"
    return None


def _why_not_rgb(layer: nn.Module) -> str | None:
    reason = _why_not_conv(getattr(layer, "conv", None))
    if reason is None and layer.conv.demodulate:
        return "it demodulates"
    return reason


class _Conv(FusedMixin):
    def forward(self, input: Tensor, style: Tensor) -> Tensor:
        return functional.modfc(
            input,
            one_by_one(self.weight),
            self.modulation(style),
            demodulate=self.demodulate,
            activation="linear",
            gain=1.0,
            layout="bchw",
            backend=self.cips_kernels_backend,
        )


class _Styled(FusedMixin):
    def forward(self, input: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        conv, activate = self.conv, self.activate
        injection = getattr(self, "noise", None)
        values = None
        if injection is not None:
            values = fresh_seed(input) if noise is None else pixel_noise(noise, input)
        return functional.modfc(
            input,
            one_by_one(conv.weight),
            conv.modulation(style),
            activate.bias.reshape(-1),
            values,
            None if injection is None else injection.weight.reshape(()),
            demodulate=conv.demodulate,
            negative_slope=activate.negative_slope,
            gain=activate.scale,
            layout="bchw",
            backend=self.cips_kernels_backend,
        )


class _ToRGB(FusedMixin):
    is_rgb = True

    def forward(self, input: Tensor, style: Tensor, skip: Tensor | None = None) -> Tensor:
        upsample = getattr(self, "upsample", None)
        if skip is not None and isinstance(upsample, nn.Module):
            skip = upsample(skip)
        conv = self.conv
        return functional.to_rgb(
            input,
            one_by_one(conv.weight),
            conv.modulation(style),
            self.bias.reshape(-1),
            None if skip is None else skip.float() if skip.dtype != input.dtype else skip,
            layout="bchw",
            backend=self.cips_kernels_backend,
        )


LAYERS = {
    "StyledConv": (_Styled, _why_not_styled),
    "StyledConvNoNoise": (_Styled, _why_not_styled),
    "ToRGB": (_ToRGB, _why_not_rgb),
    "ModulatedConv2d": (_Conv, _why_not_conv),
}
