"""Foreign models on these kernels: `patch(model)` replaces the modulated 1x1 layers of the code bases it knows, in place.

A layer is known by its class's name and looked over before it is touched: shapes, factors, activation. Its class becomes a
subclass of its own class whose `forward` calls the fused operators on the layer's own parameters, so that state dicts,
optimisers, hooks and `isinstance` go on as before; `unpatch(model)` gives the classes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..backends import check_name
from . import nvlabs, rosinality
from .common import FusedMixin

__all__ = ["PatchReport", "patch", "unpatch"]

_Check = Callable[[nn.Module], "str | None"]

# class name -> (what replaces its forward, why an instance cannot be served)
_KNOWN: dict[str, list[tuple[type[FusedMixin], _Check]]] = {}
for _family in (rosinality, nvlabs):
    for _name, _entry in _family.LAYERS.items():
        _KNOWN.setdefault(_name, []).append(_entry)


@dataclass
class PatchReport:
    """What `patch` did.

    Attributes:
        replaced: name of each replaced layer in the model -> name of its class.
        left: name of each layer of a known class that stays as it was -> why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers replaced, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {kind}" for name, kind in self.replaced.items()]
        lines += [f"  {name or '(the model)'} left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def patch(model: nn.Module, *, to_rgb: bool = True, backend: str = "auto") -> PatchReport:
    """Replace the modulated 1x1 layers and ToRGBs of a model by fused ones, in place.

    Known are the classes `StyledConv`, `StyledConvNoNoise`, `ToRGB` and `ModulatedConv2d` of StyleGAN2 in PyTorch's words,
    as CIPS, PixelFolder, GIRAFFE HD and others use them, and `SynthesisLayer` and `ToRGBLayer` of StyleGAN2-ADA and what
    grew from it. Outputs are the layer's own up to rounding; fresh noise is drawn otherwise, with the same distribution.

    Args:
        model: any module; itself may be such a layer.
        to_rgb: also the ToRGBs.
        backend: of the fused layers, see `cips_kernels.backends()`.

    Returns:
        What was replaced, and what was left and why. Layers of unknown classes are not mentioned.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_name(backend)
    report = PatchReport()
    _visit(model, "", to_rgb, backend, report)
    return report


def _visit(module: nn.Module, name: str, to_rgb: bool, backend: str, report: PatchReport) -> None:
    if isinstance(module, FusedMixin):
        report.left[name] = "it is replaced already"
        return
    entries = _KNOWN.get(type(module).__name__, [])
    if entries and entries[0][0].is_rgb and not to_rgb:
        report.left[name] = "to_rgb=False"
        return
    reasons = []
    for mixin, why_not in entries:
        reason = why_not(module)
        if reason is None:
            report.replaced[name] = type(module).__name__
            module.__class__ = mixin.over(type(module))
            module.cips_kernels_backend = backend
            return  # what it consists of is used by it alone
        reasons.append(reason)
    if reasons:
        report.left[name] = "; ".join(reasons)
    for child_name, child in module.named_children():
        _visit(child, f"{name}.{child_name}" if name else child_name, to_rgb, backend, report)


def unpatch(model: nn.Module) -> list[str]:
    """Give every layer that `patch` replaced its class back. Returns their names."""
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, FusedMixin):
            module.__class__ = type(module).original
            del module.cips_kernels_backend
            restored.append(name)
    return restored
