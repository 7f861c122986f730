"""Who is timed: PyTorch's own operators in two formulations, each also compiled, and all our backends.

All of them take the same `Problem` and give the same output: the RGB sum of a stack, the features of a layer,
the modulated weights of `modulate`. A provider only chooses how the input lies in memory, and draws its own
noise of the same law.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rivals
from cases import Problem
from cips_kernels import functional
from cips_kernels.backends import NAMES as BACKENDS
from cips_kernels.backends import why_not

PIXELS = "pixels"
PLANES = "planes"
CHANNELS_LAST = "planes, channels last"

# What a provider computes: (problem, noise) -> output. Noise is None (off), "fresh" (it draws) or [L, B, P].
Function = Callable[[Problem, rivals.Noise], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: as it stands in the results.
        function: see `Function`; the problem's `x` and `grad` come in `layout`.
        layout: `PIXELS` `[B, P, C]`, `PLANES` `[B, C, H, W]`, or the latter in channels-last memory.
        compiled: goes through torch.compile; then only its own fresh noise can be asked for, since every
            other choice would be another compilation.
        seeded: its fresh noise is this package's counter noise of `problem.seed`, so it is checked too.
        unavailable: why it cannot run here, or None.
    """

    name: str
    function: Function
    layout: str = PIXELS
    compiled: bool = False
    seeded: bool = False
    unavailable: str | None = None

    def adapt(self, problem: Problem) -> Problem:
        """The problem with `x` and `grad` in this provider's layout."""
        if self.layout == PIXELS or problem.x is None:
            return problem
        x = self._to_planes(problem.x.detach(), problem).requires_grad_()
        return dataclasses.replace(problem, x=x, grad=self._to_planes(problem.grad, problem))

    def _to_planes(self, t: Tensor, problem: Problem) -> Tensor:
        planes = t.transpose(1, 2).unflatten(2, (problem.case.height, problem.case.width))
        if self.layout == PLANES:
            return planes.contiguous()
        # A grouped convolution sees all images as channels of one: channels-last is [1, H, W, B * C].
        batch, channels, height, width = planes.shape
        merged = planes.permute(2, 3, 0, 1).reshape(height, width, batch * channels)
        return merged.view(height, width, batch, channels).permute(2, 3, 0, 1)

    def to_pixels(self, t: Tensor) -> Tensor:
        """A tensor of this provider's as `[B, P, C]`; modulated weights `[B, O, I]` stay as they are."""
        return t.flatten(2).transpose(1, 2) if t.dim() == 4 else t


def _rival(stack: Callable[..., tuple[Tensor, Tensor | None]], modulate: Callable[..., Tensor]) -> Function:
    def function(problem: Problem, noise: rivals.Noise) -> Tensor:
        if problem.case.name == "modulate":
            return modulate(problem.weights[0], problem.styles[0], problem.case.dtype)
        return stack(*_arguments(problem), noise)

    return function


def _arguments(p: Problem) -> tuple:
    layers = (p.weights, p.styles, p.biases, p.strengths)
    return p.x, *layers, p.rgb_weights, p.rgb_styles, p.rgb_biases, p.case.rgb_after


def _last(outputs: tuple[Tensor, Tensor | None]) -> Tensor:
    features, rgb = outputs
    return features if rgb is None else rgb


def _grouped_conv(*args: object) -> Tensor:
    return _last(rivals.grouped_conv(*args))


def _bmm(*args: object) -> Tensor:
    return _last(rivals.bmm(*args))


def _bmm_for_compiler(*args: object) -> Tensor:
    return _last(rivals.bmm(*args, for_compiler=True))


def _modulate_as_published(weight: Tensor, style: Tensor, dtype: torch.dtype) -> Tensor:
    return rivals.modulate_as_published(weight, style).to(dtype)


def _modulate(weight: Tensor, style: Tensor, dtype: torch.dtype) -> Tensor:
    return rivals.modulate(weight, style).to(dtype)


def _compiled(
    stack: Callable[..., Tensor], modulate: Callable[..., Tensor], mode: str | None = None
) -> Function:
    options = dict(dynamic=False, fullgraph=True, mode=mode)
    return _rival(torch.compile(stack, **options), torch.compile(modulate, **options))


def _ours(backend: str) -> Function:
    def function(p: Problem, noise: rivals.Noise) -> Tensor:
        chosen = p.seed if isinstance(noise, str) else noise
        if p.case.name == "modulate":
            return functional.modulate(p.weights[0], p.styles[0], dtype=p.case.dtype, backend=backend)
        if p.case.name == "layer":
            given = chosen[0] if isinstance(chosen, Tensor) and chosen.dim() == 3 else chosen
            options = dict(layout="bpc", backend=backend)
            return functional.modfc(
                p.x, p.weights[0], p.styles[0], p.biases[0], given, p.strengths[0], **options
            )
        options = dict(noise=chosen, layout="bpc", want_features=False, backend=backend)
        return _last(functional.modfc_stack(*_arguments(p), **options))

    return function


PLAIN = Provider("plain", _rival(lambda *args: _last(rivals.plain(*args)), _modulate_as_published))
RIVALS: dict[str, Callable[[str], Provider]] = {
    "grouped_conv": lambda layout: Provider(
        "grouped_conv", _rival(_grouped_conv, _modulate_as_published), layout=layout
    ),
    "grouped_conv_compiled": lambda layout: Provider(
        "grouped_conv_compiled",
        _compiled(_grouped_conv, _modulate_as_published),
        layout=layout,
        compiled=True,
    ),
    "bmm": lambda _: Provider("bmm", _rival(_bmm, _modulate)),
    "bmm_compiled": lambda _: Provider(
        "bmm_compiled", _compiled(_bmm_for_compiler, _modulate), compiled=True
    ),
    "bmm_autotuned": lambda _: Provider(
        "bmm_autotuned", _compiled(_bmm_for_compiler, _modulate, "max-autotune-no-cudagraphs"), compiled=True
    ),
}
EXTRA = ("bmm_autotuned",)  # only where asked for by name: minutes of autotuning
NAMES = (*RIVALS, *BACKENDS)


def reason_of(error: Exception) -> str:
    """One line for the report."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


@functools.cache
def compiler_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled here (no C++ compiler, say), found by compiling one line; None where it can.

    What the first compilation of a process costs beyond its own is paid here, and by no provider.
    """
    try:
        torch.compile(lambda t: t.sin() + 1, dynamic=False, fullgraph=True)(torch.ones(64, device=device))
    except Exception as error:
        return f"torch.compile does not work here: {reason_of(error)}"
    finally:
        torch.compiler.reset()
    return None


def default_names(device: torch.device) -> tuple[str, ...]:
    """The providers timed where none are named."""
    mine = [name for name in BACKENDS if why_not(name, device, torch.float32) is None]
    if device.type == "cpu" and "triton" in mine:
        mine.remove("triton")  # the interpreter: right, and a thousand times slower
    return (*(name for name in RIVALS if name not in EXTRA), *mine)


def build(name: str, device: torch.device, dtype: torch.dtype, planes: str = PLANES) -> Provider:
    """The provider of that name.

    Args:
        name: one of `NAMES`.
        device, dtype: what it shall serve; `Provider.unavailable` says why it cannot.
        planes: layout of the grouped convolution, `PLANES` or `CHANNELS_LAST`.
    """
    if name in RIVALS:
        return RIVALS[name](planes)
    if name not in BACKENDS:
        raise ValueError(f"provider: expected one of {', '.join(NAMES)}, got {name!r}")
    return Provider(name, _ours(name), seeded=True, unavailable=why_not(name, device, dtype))
