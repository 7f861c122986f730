"""A stack made ready for inference: its parameters gathered once instead of in every call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, vectors
from .activations import resolve_activation
from .arguments import check_coords, describe, expect_device, expect_finite, split_noise
from .backends import resolve
from .encoding import Encoding, check_encoding
from .modules import FusedModFCStack, ModuleNoise, call_noise
from .packing import flatten
from .spec import StackInputs, StackSpec


class PreparedStack:
    """What `FusedModFCStack` computes from an `Encoding`, without gradients and with less to do in a call.

    A call of the module joins every weight, scales and joins every affine, and joins every bias: some ten launches and
    60 MB of traffic for the paper's stack, as long as a tenth of a 256x256 image. Here that is done once.

    Args:
        stack: a `FusedModFCStack` with ToRGBs. Its parameters are copied: after they change, call `refresh`.

    Call:
        `prepared(encoding, style, noise=None)` -> RGB sum `[B, P, C]`, as the module's; style `[B, style_dim]` or
        `[B, layers and ToRGBs, style_dim]`. `behind`: the weights of the mapping network, if `functional.mapping`
        runs right before this call, in the same stream: the call then begins under it.

    Raises:
        ValueError: a stack without ToRGBs; or as the module.
    """

    def __init__(self, stack: FusedModFCStack) -> None:
        if not stack.rgb_after:
            raise ValueError("stack: expected one with ToRGBs, got none")
        self.stack = stack
        layer = stack.layers[0]
        widths = (layer.in_features, *(layer.out_features for layer in stack.layers))
        kind, slope, gain = resolve_activation(layer.activation, layer.negative_slope, layer.gain)
        self.spec = StackSpec(
            widths, stack.rgb_after, stack.out_channels, layer.demodulate, slope, gain, layer.eps,
            blocks=stack.blocks, activation=kind,
        )  # fmt: skip
        self._parts = self._gather()

    @torch.no_grad()
    def _gather(self) -> dict[str, Tensor]:
        stack = self.stack
        modules = [*stack.layers, *stack.to_rgbs]
        weight = torch.cat([module.affine.weight for module in modules])
        wide = weight.dtype
        skips = [skip for skip in stack.skip_weights if skip is not None]
        strengths = [layer.noise_strength for layer in stack.layers]
        biases = [
            weight.new_zeros(module.weight.shape[0]) if module.bias is None else module.bias for module in modules
        ]
        return {
            "affine_weight": weight * modules[0].affine.scale,
            "affine_bias": torch.cat([module.affine.bias for module in modules]),
            "weights": flatten([*(module.weight for module in modules), *skips], wide),
            "biases": flatten(biases, wide),
            "noise_strengths": torch.stack([weight.new_ones(()) if s is None else s.to(wide) for s in strengths]),
        }

    def refresh(self) -> None:
        """Take over the stack's parameters as they are now, in place: a captured CUDA graph goes on with them."""
        for name, value in self._gather().items():
            self._parts[name].copy_(value)

    def styles(self, style: Tensor, behind: Tensor | None = None) -> Tensor:
        """The output of every affine, joined: `[B, S]`. behind: see the call."""
        weight, bias = self._parts["affine_weight"], self._parts["affine_bias"]
        count, dim = len(self.stack.layers) + len(self.stack.to_rgbs), self.stack.style_dim
        if style.dim() not in (2, 3) or style.shape[-1] != dim or (style.dim() == 3 and style.shape[1] != count):
            raise ValueError(f"style: expected [B, {dim}] or [B, {count}, {dim}], got {describe(style)}")
        expect_device("style", style, weight, "the stack")
        if style.dtype != weight.dtype:
            raise TypeError(f"style: expected {weight.dtype} as the stack's parameters, got {describe(style)}")
        if style.dim() == 2:
            return vectors.affine(style, weight, bias, self._parts["weights"], behind)
        sizes = [module.in_features for module in (*self.stack.layers, *self.stack.to_rgbs)]
        parts = zip(style.unbind(1), weight.split(sizes), bias.split(sizes))
        return torch.cat([torch.addmm(b, s, w.t()) for s, w, b in parts], 1)

    @torch.no_grad()
    def __call__(
        self, encoding: Encoding, style: Tensor, noise: ModuleNoise = None, *, behind: Tensor | None = None
    ) -> Tensor:
        check_encoding(encoding)
        styles, spec = self.styles(style, behind), self.spec
        e, batch = encoding, len(styles)
        dtype = e.dtype or e.fourier_weight.dtype
        if e.features != spec.widths[0]:
            raise ValueError(f"encoding: expected {spec.widths[0]} channels, got {e.features}")
        if e.images not in (1, batch):
            raise ValueError(f"coords: expected points for each of {batch} images, got {describe(e.coords)}")
        expect_finite("style", styles)
        expect_device("encoding", e.fourier_weight, styles, "the stack")
        parts = self._parts
        if batch * e.pixels == 0:
            return styles.new_zeros((batch, e.pixels, spec.rgb_channels))
        # stands for the encoding in the check of the noise, and has no memory
        x = torch.empty((), dtype=dtype, device=styles.device).expand(1, e.pixels, e.features)
        enabled = self.stack.layers[0].noise_strength is not None
        seed, given = split_noise(call_noise(noise, enabled, styles.device), spec.depth, batch, x)
        check_coords(e.coords, batch, x)
        inputs = StackInputs(
            x, parts["weights"], styles, parts["biases"], parts["noise_strengths"], None, seed, given, None
        )
        name = resolve(self.stack.backend, styles.device, dtype, spec.activation == "lrelu")
        return ops.run_synthesis(e, inputs, spec, name)
